"""`seg4diff analyze`: which block gives the text most, and where words are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.analysis.generating_records import generating_records
from seg4diff_jax.analysis.principal_components import ComponentsReader, block_components
from seg4diff_jax.analysis.prompt_statistics import noised_squares
from seg4diff_jax.analysis.word_views import (
    BOTH_WAYS,
    HEADS_AVERAGED,
    HEADS_KEPT,
    both_directions,
    by_blocks,
    by_heads,
    by_levels,
    of_pads,
    seen_in_image,
    seen_while_generating,
)
from seg4diff_jax.command_line import analyze, main
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.reporting import drawings
from seg4diff_jax.reporting.component_sheet import component_sheet
from seg4diff_jax.reporting.drawings import draw_maps, draw_words
from tests.reference.inputs import SQUARE, an_image


class Drawn(NamedTuple):
    """What `draw_maps` was given, and the sheet that it made."""

    maps: list
    columns: int | None
    sheet: Image.Image


@pytest.fixture
def drawn(monkeypatch) -> list[Drawn]:
    """Of each sheet of maps that is drawn, also by `draw_words`."""
    sheets = []

    def draw(image, maps, columns=None):
        sheets.append(Drawn(list(maps), columns, draw_maps(image, maps, columns)))
        return sheets[-1].sheet

    monkeypatch.setattr(analyze, "draw_maps", draw)
    monkeypatch.setattr(drawings, "draw_maps", draw)
    return sheets


def assert_drawn(drawn: list[Drawn], file: Path, expected: Sequence, columns: int | None = None) -> None:
    """The file is the one sheet that was drawn, of the maps expected.

    Maps are compared, not two pictures: a heat map has 256 colours, and a rounding that moves a value over the edge
    between two of them is four grey levels.
    """
    ((maps, as_many, sheet),) = drawn
    np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(sheet))
    assert [title for title, _ in maps] == [title for title, _ in expected]
    assert as_many == columns
    np.testing.assert_allclose([each for _, each in maps], [each for _, each in expected], rtol=1e-4)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(an_image(SQUARE, SQUARE)).save(path)
    return str(path)


def test_the_table_shows_each_blocks_share_and_marks_the_largest(sd3, sd3_checkpoint, picture, capsys):
    assert main(["analyze", picture, "house", "tree", "--find-expert", "--model", str(sd3_checkpoint)]) == 0
    table = capsys.readouterr().out
    request = AttentionRequest(text_tokens=(0, None), mean_heads=True)
    records = sd3.attention(picture, "house tree", request=request, size=(SQUARE, SQUARE))
    expected = {block: 100 * float(np.asarray(record.probs).sum(-1).mean()) for block, record in records.items()}
    rows = re.finditer(r"^ *(\d+) +([\d.]+) %(\*?) ", table, re.MULTILINE)
    found = {int(line[1]): float(line[2]) for line in rows}
    assert found == pytest.approx(expected, abs=0.06)
    marked = re.search(r"^ *(\d+) +[\d.]+ %\* ", table, re.MULTILINE)
    assert marked is not None
    assert int(marked[1]) == max(expected, key=lambda block: expected[block])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to analyze: --find-expert"),
        (["--find-expert", "--step", "29"], "step is 29"),
        (["--find-expert", "--seed", "-1"], "seed"),
    ],
)
def test_what_cannot_be_analyzed_is_told(sd3_checkpoint, picture, options, message, capsys):
    assert main(["analyze", picture, "house", "--model", str(sd3_checkpoint), *options]) == 1
    assert message in capsys.readouterr().err


# ---- where words are ------------------------------------------------------------------------------------------------


def test_words_are_drawn_as_in_python(sd3, sd3_checkpoint, picture, tmp_path, drawn, capsys):
    prompt, out = "a cat by the sea", tmp_path / "new" / "words.png"
    command = ["analyze", picture, "--prompt", prompt, "--model", str(sd3_checkpoint), "--block", "2", "--step", "5"]
    assert main([*command, "--words", "cat", "the sea", "--out", str(out)]) == 0
    assert f"wrote {out}: block 2, noise level 5" in capsys.readouterr().err.replace("\n", "")
    record = sd3.attention(picture, prompt, blocks=2, step=5)[2]
    assert_drawn(drawn, out, [(words, record.of(words)) for words in ("cat", "the sea")])


def views_of(seen: Any, by: str) -> tuple[list, int | None]:
    """Of the word cat, and how many are in a row."""
    return {
        "heads": lambda: (by_heads(next(iter(seen.records.values())), "cat"), None),
        "blocks": lambda: (by_blocks(seen.records, "cat"), None),
        "levels": lambda: (by_levels(seen.levels, "cat"), 6),
        "directions": lambda: (both_directions(seen.records, "cat"), 4),
    }[by]()


REQUESTS = {"heads": HEADS_KEPT, "blocks": HEADS_AVERAGED, "levels": HEADS_AVERAGED, "directions": BOTH_WAYS}


@pytest.mark.parametrize("is_generated", [False, True], ids=["on an image", "while generating"])
@pytest.mark.parametrize("by", REQUESTS)
def test_a_word_is_drawn_from_each_side_as_in_python(sd3, sd3_checkpoint, picture, tmp_path, drawn, by, is_generated):
    out, prompt = tmp_path / "views.png", "a cat by the sea"
    command = ["analyze", *([] if is_generated else [picture]), "--prompt", prompt, "--words", "cat", "--by", by]
    command += ["--steps", "6", "--guidance", "3"] if is_generated else []
    command += ["--at-steps", "3", "6"] if by == "levels" else ["--step", "5"]
    command += ["--block", "2"] if by == "heads" else []
    assert main([*command, "--out", str(out), "--model", str(sd3_checkpoint)]) == 0
    how: Any = {"blocks": [2] if by == "heads" else range(6), "levels": (3, 6) if by == "levels" else (5,)}
    if is_generated:
        seen = seen_while_generating(sd3, prompt, REQUESTS[by], steps=6, guidance=3.0, **how)
    else:
        seen = seen_in_image(sd3, picture, prompt, REQUESTS[by], **how)
    assert_drawn(drawn, out, *views_of(seen, by))


def test_components_are_drawn_as_in_python(sd3, sd3_checkpoint, picture, tmp_path):
    out = tmp_path / "components.png"
    command = ["analyze", picture, "cat", "--components", "--step", "5", "--seed", "3", "--out", str(out)]
    assert main([*command, "--model", str(sd3_checkpoint)]) == 0
    images = noised_squares(sd3, [picture], step=5, seed=3)
    found = block_components(sd3.transformer, images, sd3.encode_prompts(["cat"]))
    expected = np.asarray(component_sheet(np.asarray(found.scores)[0], images.grid(2)), int)
    drawn = np.asarray(Image.open(out), int)
    assert drawn.shape == expected.shape
    assert np.percentile(np.abs(drawn - expected), 99) <= 4  # pictures are made by two compiled programs


def test_components_are_drawn_while_generating(sd3, sd3_checkpoint, tmp_path, capsys):
    out = tmp_path / "components.png"
    command = ["analyze", "--prompt", "a cat", "--components", "--steps", "4", "--step", "2", "--out", str(out)]
    assert main([*command, "--model", str(sd3_checkpoint)]) == 0
    found = generating_records(sd3, "a cat", ComponentsReader(), blocks=range(6), levels=(2,), steps=4, guidance=7.5)
    scores = np.stack([np.asarray(record.scores)[0] for record in found.levels[2].values()])
    drawn, expected = np.asarray(Image.open(out), int), np.asarray(component_sheet(scores, found.grid), int)
    assert np.percentile(np.abs(drawn - expected), 99) <= 4
    assert "noise level 2 of 4, while generating" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("is_generated", [False, True], ids=["on an image", "while generating"])
def test_maps_of_pads_are_drawn_as_in_python(sd3, sd3_checkpoint, picture, tmp_path, drawn, is_generated):
    out, how = tmp_path / "pads.png", ["--pads", "--block", "1", "--model", str(sd3_checkpoint), "--out"]
    if is_generated:  # by default at the level that is the checkpoint's, 8 of 28, in as many steps
        assert main(["analyze", "--steps", "7", *how, str(out)]) == 0
        options: Any = {"blocks": [1], "levels": (2,), "steps": 7, "guidance": 7.5}
        seen = seen_while_generating(sd3, "", HEADS_AVERAGED, **options)
    else:
        assert main(["analyze", picture, "--step", "5", *how, str(out)]) == 0
        seen = seen_in_image(sd3, picture, "", HEADS_AVERAGED, blocks=[1], levels=(5,))
    assert_drawn(drawn, out, of_pads(seen.records[1]))


def test_without_a_name_each_class_or_word_is_drawn_where_a_time_says(sd3_checkpoint, picture, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        analyze, "draw_words", lambda _, record, words: drawn.append(words) or draw_words(picture, record, words)
    )
    command = ["analyze", picture, "--model", str(sd3_checkpoint), "--block", "0", "--words"]
    assert main([*command[:2], "traffic light", "sky", *command[2:]]) == 0
    assert main([*command, "--prompt", "the sky, and the sea", "--find-expert"]) == 0
    assert drawn == [["traffic light", "sky"], ["the", "sky", "and", "sea"]]
    assert list((tmp_path / "runs" / "analyze").glob("picture-*.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "!", "--words"], "error: the prompt '!' has no word to draw"),
        (["cat", "--words", "--out", "{taken}"], "error: --out {taken} is there already: name another file, or give"),
        (["cat", "--words", "dog"], "error: the prompt 'cat' has no 'dog': its words are cat"),
        (["cat", "--words", "cat", "--block", "6"], "error: block is 6; {checkpoint} has blocks 0..5"),
        (["cat", "--words", "cat", "--out", "words.jpg"], "error: --out is words.jpg: expected a name that ends in"),
        (["cat", "--words", "--out", "{picture}"], "error: --out {picture} is the image itself: name another file"),
        (["cat", "--find-expert", "--block", "2"], "error: --block is of --words, of --by heads and of --pads"),
        (["cat", "--find-expert", "--out", "a.png"], "error: --out is of --words, --pads and --components, which are"),
        (["cat", "--components", "--block", "2"], "error: --block is of --words, of --by heads and of --pads"),
        (["cat", "--components", "--words", "cat"], "error: --words and --components are pictures of their own"),
        (["--components"], "error: say what is in the image, CLASS... or --prompt: found neither"),
        (["cat", "sea", "--words", "--by", "heads"], "error: --by takes one word: give it to --words"),
        (["cat", "--words", "cat", "sea", "--by", "heads"], "error: --by takes one word: give it to --words"),
        (["cat", "--find-expert", "--by", "heads"], "error: --by takes one word: give it to --words"),
        (["cat", "--pads"], "error: --pads is of an empty prompt: leave out CLASS, --prompt and --by"),
        (["--pads", "--find-expert"], "error: --pads is of an empty prompt and --find-expert of one with words"),
        (["cat", "--words", "cat", "--by", "levels", "--at-steps", "29"], "error: step is 29"),
        (["cat", "--words", "cat", "--by", "heads", "--at-steps", "3"], "error: --at-steps is of --statistics"),
        (["--words"], "error: say what is in the image, CLASS... or --prompt: found neither"),
        (["cat", "--prompt", "a cat", "--words"], "error: say what is in the image, CLASS... or --prompt: found both"),
    ],
)
def test_words_that_cannot_be_drawn_are_told(sd3_checkpoint, picture, options, message, tmp_path, capsys):
    places = {"picture": picture, "checkpoint": sd3_checkpoint, "taken": tmp_path / "taken.png"}
    places["taken"].write_bytes(b"mine")
    given = [option.format(**places) for option in options]
    assert main(["analyze", picture, *given, "--model", str(sd3_checkpoint)]) == 1
    assert message.format(**places) in capsys.readouterr().err.replace("\n", " ").replace("  ", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--find-expert", "--prompt", "a cat"], "error: name an image: without one --words, --pads, --components"),
        (["--words"], "error: say what is in the image, CLASS... or --prompt: found neither"),
        (
            ["--words", "cat", "--prompt", "a cat", "--steps", "4", "--step", "5"],
            "noise level 5 is not of this run",
        ),
        (["--words", "cat", "--prompt", "a cat", "--steps", "0"], "steps is 0; expected a whole number"),
    ],
)
def test_what_a_run_without_an_image_cannot_show_is_told(sd3_checkpoint, options, message, capsys):
    assert main(["analyze", *options, "--model", str(sd3_checkpoint)]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("option", [["--steps", "4"], ["--guidance", "3"], ["--sampler", "euler"]])
def test_options_of_a_run_are_refused_with_an_image(sd3_checkpoint, picture, option, capsys):
    assert main(["analyze", picture, "cat", "--words", *option, "--model", str(sd3_checkpoint)]) == 1
    assert f"error: {option[0]} is of --statistics or of runs without an image" in capsys.readouterr().err
