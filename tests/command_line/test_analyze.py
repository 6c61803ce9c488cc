"""`seg4diff analyze`: which block gives the text most, and where words are."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.analysis.principal_components import block_components
from seg4diff_jax.analysis.prompt_statistics import noised_squares
from seg4diff_jax.analysis.word_views import Seen, both_directions, by_blocks, by_heads, by_levels, of_pads
from seg4diff_jax.command_line import analyze, main
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.reporting.component_sheet import component_sheet
from seg4diff_jax.reporting.drawings import draw_maps, draw_words
from tests.reference.inputs import SQUARE, an_image


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


def test_words_are_drawn_as_in_python(sd3, sd3_checkpoint, picture, tmp_path, capsys):
    prompt, out = "a cat by the sea", tmp_path / "new" / "words.png"
    command = ["analyze", picture, "--prompt", prompt, "--model", str(sd3_checkpoint), "--block", "2", "--step", "5"]
    assert main([*command, "--words", "cat", "the sea", "--out", str(out)]) == 0
    assert f"wrote {out}: block 2, noise level 5" in capsys.readouterr().err.replace("\n", "")
    record = sd3.attention(picture, prompt, blocks=2, step=5)[2]
    expected = np.asarray(draw_words(picture, record, ["cat", "the sea"]), int)
    assert np.abs(np.asarray(Image.open(out), int) - expected).max() <= 2


@pytest.mark.parametrize("by", ["heads", "blocks", "levels", "directions"])
def test_a_word_is_drawn_from_each_side_as_in_python(sd3, sd3_checkpoint, picture, tmp_path, by):
    out, seen = tmp_path / "views.png", Seen(picture, "a cat by the sea", "cat", 5)
    command = ["analyze", picture, "--prompt", seen.prompt, "--words", "cat", "--by", by]
    more = (
        ["--at-steps", "3", "28"] if by == "levels" else ["--step", "5", *(["--block", "2"] if by == "heads" else [])]
    )
    assert main([*command, *more, "--out", str(out), "--model", str(sd3_checkpoint)]) == 0
    views, columns = {
        "heads": lambda: (by_heads(sd3, seen, 2), None),
        "blocks": lambda: (by_blocks(sd3, seen), None),
        "levels": lambda: (by_levels(sd3, seen, (3, 28)), 6),
        "directions": lambda: (both_directions(sd3, seen), 4),
    }[by]()
    expected = np.asarray(draw_maps(picture, views, columns), int)
    assert np.abs(np.asarray(Image.open(out), int) - expected).max() <= 2


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


def test_maps_of_pads_are_drawn_as_in_python(sd3, sd3_checkpoint, picture, tmp_path):
    out = tmp_path / "pads.png"
    command = ["analyze", picture, "--pads", "--block", "1", "--step", "5", "--model", str(sd3_checkpoint)]
    assert main([*command, "--out", str(out)]) == 0
    expected = np.asarray(draw_maps(picture, of_pads(sd3, picture, 1, 5)), int)
    assert np.abs(np.asarray(Image.open(out), int) - expected).max() <= 2


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
