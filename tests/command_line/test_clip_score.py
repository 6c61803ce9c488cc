"""`seg4diff clip-score` at the terminal: scores as transformers computes them, their files, and differences of two."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from seg4diff_jax.analysis.paired_difference import paired_difference
from seg4diff_jax.command_line import clip_score, main
from seg4diff_jax.command_line.picture_directory import RECORD, SCORES, Layout, picture_files
from seg4diff_jax.convert.sources.open import MINIATURE
from tests.reference.inputs import an_image

PROMPTS = ["a green star on wood", "a ball, on grass", "a ring\u00a0on sand"]
CLIP = ["--clip", "miniature"]


def pictured(directory: Path, prompts: list[str], first: int = 0, layout: Layout = "numbered", **record) -> Path:
    """A directory as `generate` leaves it, with pictures of noise."""
    files = picture_files(prompts, 1, layout)
    (directory / files[0]).parent.mkdir(parents=True)
    for number, file in enumerate(files, first):
        Image.fromarray(an_image(48, 64, number)).save(directory / file)
    pictures = [{"file": file, "prompt": prompt} for file, prompt in zip(files, prompts, strict=True)]
    (directory / RECORD).write_text(json.dumps({"seed": 0, **record, "pictures": pictures}))
    return directory


@torch.no_grad()
def torch_cosines(directory: Path) -> np.ndarray:
    """100 x cosine of each picture and its prompt, as torchmetrics' CLIPScore computes it before its mean."""
    made = json.loads((directory / RECORD).read_text())["pictures"]
    processor = CLIPImageProcessor.from_pretrained(MINIATURE / "image_encoder")
    seen = processor([Image.open(directory / each["file"]) for each in made], return_tensors="pt").pixel_values
    pictures = CLIPVisionModelWithProjection.from_pretrained(MINIATURE / "image_encoder").float()(seen).image_embeds
    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer")
    words = tokenizer(
        [each["prompt"] for each in made], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    encoder = CLIPTextModelWithProjection.from_pretrained(MINIATURE / "text_encoder").float()
    prompts = encoder(words.input_ids).text_embeds
    return 100 * torch.nn.functional.cosine_similarity(pictures, prompts, dim=-1).numpy()


def columns(directory: Path) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    with (directory / SCORES).open(newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    assert names == ["file", "prompt", "CLIPScore", "100 x cosine"]
    files, prompts, scores, hundred = zip(*rows, strict=True)
    return [*files], [*prompts], np.array(scores, float), np.array(hundred, float)


# ---- one directory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["2", "32"])
def test_scores_are_those_of_transformers_whatever_the_batch(tmp_path, capsys, batch):
    directory = pictured(tmp_path / "made", [*PROMPTS, PROMPTS[0], "grass " * 40], layout="compbench")
    assert main(["clip-score", str(directory), *CLIP, "--batch", batch]) == 0
    expected = torch_cosines(directory)
    assert expected.min() < 0 < expected.max(), "the two means differ"
    files, prompts, scores, hundred = columns(directory)
    made = json.loads((directory / RECORD).read_text())["pictures"]
    assert [{"file": file, "prompt": prompt} for file, prompt in zip(files, prompts, strict=True)] == made
    np.testing.assert_allclose(hundred, expected, atol=1e-3)
    np.testing.assert_allclose(scores, np.maximum(expected, 0), atol=1e-3)
    printed = capsys.readouterr().out
    clamped, plain = (float(each) for each in re.findall(r": (-?\d+\.\d{4})$", printed, re.M))
    assert clamped == pytest.approx(np.maximum(expected, 0).mean(), abs=1e-3)
    assert plain == pytest.approx(expected.mean(), abs=1e-3)
    assert "5 pictures of 4 prompts, by miniature" in printed


def test_cut_prompts_are_counted_once_each_and_not_warned_of(tmp_path, capsys, recwarn):
    long, fits = "grass " * 80, "a " * 75
    directory = pictured(tmp_path / "made", [PROMPTS[0], long.strip(), long.strip(), fits.strip()])
    assert main(["clip-score", str(directory), *CLIP]) == 0
    assert "1 prompt cut at 77 tokens" in capsys.readouterr().out
    assert not [warning for warning in recwarn if "tokens" in str(warning.message)]


def test_no_more_pictures_are_read_at_once_than_the_batch(tmp_path, monkeypatch):
    directory = pictured(tmp_path / "made", PROMPTS * 2)
    events, read, score = [], clip_score.read_image, clip_score.clip_t
    monkeypatch.setattr(clip_score, "read_image", lambda file: events.append("read") or read(file))
    monkeypatch.setattr(clip_score, "clip_t", lambda *a, **k: events.append("score") or score(*a, **k))
    assert main(["clip-score", str(directory), *CLIP, "--batch", "4"]) == 0
    assert events == ["read"] * 4 + ["score"] + ["read"] * 2 + ["score"]


def test_what_generate_wrote_is_scored_and_made_anew_without_former_scores(tmp_path, sd3_checkpoint, capsys):
    out = tmp_path / "out"
    arguments = ["generate", "a cat", "sofa", "--steps", "1", "--guidance", "1", "--size", "32x32", "--out", str(out)]
    arguments += ["--model", str(sd3_checkpoint)]
    assert main(arguments) == 0
    assert main(["clip-score", str(out), *CLIP]) == 0
    assert "2 pictures of 2 prompts" in capsys.readouterr().out
    assert columns(out)[0] == ["00_a_cat.png", "01_sofa.png"]
    assert main([*arguments, "--overwrite"]) == 0
    assert not (out / SCORES).exists()


# ---- two directories ------------------------------------------------------------------------------------------------


def test_two_directories_are_paired_by_prompt_and_number(tmp_path, capsys):
    """Prompts come in another order, and those of a prompt are paired in the order that they have."""
    base = pictured(tmp_path / "base", [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2]])
    other = pictured(tmp_path / "other", [PROMPTS[2], PROMPTS[0], PROMPTS[1], PROMPTS[0]], first=4, seed=1)
    assert main(["clip-score", str(base), str(other), *CLIP]) == 0
    first, second = torch_cosines(base), torch_cosines(other)[[1, 3, 2, 0]]
    expected = paired_difference(first, second, np.array([0, 0, 1, 2]))
    printed = capsys.readouterr()
    (mean,) = re.findall(rf"{other} minus {base}, the mean of 100 x cosine: ([+-][\d.]+)", printed.out)
    (low, high, says) = re.findall(
        r"95 % interval (\S+) to (\S+), by 10000 resamples of 3 prompts: (\w+) 0", printed.out
    )[0]
    np.testing.assert_allclose([float(mean), float(low), float(high)], expected, atol=2e-3)
    assert says == ("excludes" if expected.excludes_zero else "includes")
    assert "the two were not made alike: seed 0 and 1" in printed.err
    assert all((directory / SCORES).is_file() for directory in (base, other))


def test_the_same_pictures_differ_by_nothing(tmp_path, capsys):
    directories = [str(pictured(tmp_path / name, PROMPTS)) for name in ("base", "other")]
    assert main(["clip-score", *directories, *CLIP]) == 0
    printed = capsys.readouterr()
    assert "100 x cosine: +0.0000\n  95 % interval +0.0000 to +0.0000" in printed.out
    assert "3 prompts: includes 0" in printed.out
    assert "not made alike" not in printed.err


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a", "b", "d"], "of 'c' the first has 1 picture and the second 0"),
        (["a", "b", "b", "c"], "of 'b' the first has 1 picture and the second 2"),
        (["a", "b", "c", "e"], "of 'e' the first has 0 pictures and the second 1"),
    ],
)
def test_other_prompts_are_refused_with_the_first_that_differs(tmp_path, monkeypatch, capsys, prompts, said):
    monkeypatch.setattr(clip_score, "load_clip", lambda _: pytest.fail("weights were read"))
    base, other = pictured(tmp_path / "base", ["a", "b", "c"]), pictured(tmp_path / "other", prompts)
    assert main(["clip-score", str(base), str(other), *CLIP]) == 1
    assert capsys.readouterr().err == f"error: {base} and {other} are not of the same prompts: {said}\n"
    alone = [str(pictured(tmp_path / name, ["a", "a"])) for name in ("one", "two")]
    assert main(["clip-score", *alone, *CLIP]) == 1
    assert "are of one prompt: an interval over prompts needs at least two" in capsys.readouterr().err


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda made: (made / RECORD).unlink(), f"{RECORD}: no such file; expected what `seg4diff generate` wrote"),
        (
            lambda made: ((made / RECORD).unlink(), (made / "progress").mkdir()),
            f"{RECORD}: no such file; its run is not finished: give --resume to go on",
        ),
        (lambda made: (made / "01_b.png").unlink(), "no file '01_b.png', which generation"),
        (lambda made: (made / "01_b.png").write_bytes(b"GIF"), "01_b.png: cannot be read as an im"),
        (lambda made: (made / RECORD).write_text('{"pictures": []}'), "pictures is []; expected a list of files and"),
        (lambda made: (made / RECORD).write_text('{"pictures": [{"file": "a"}]}'), "picture 0 is {'file': 'a'}; exp"),
        (lambda made: (made / RECORD).write_text("{"), f"{RECORD}: not JSON"),
    ],
)
def test_a_directory_that_cannot_be_scored_is_one_sentence(tmp_path, capsys, damage, message):
    directory = pictured(tmp_path / "made", ["a", "b"])
    damage(directory)
    assert main(["clip-score", str(directory), *CLIP]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (directory / SCORES).exists()


def test_a_clip_and_a_batch_that_are_not_there_are_one_sentence(tmp_path, capsys):
    directory = pictured(tmp_path / "made", ["a", "b"])
    assert main(["clip-score", str(directory), "--clip", str(tmp_path / "absent")]) == 1
    assert str(tmp_path / "absent") in capsys.readouterr().err
    assert main(["clip-score", str(directory), *CLIP, "--batch", "0"]) == 1
    assert capsys.readouterr().err == "error: --batch is 0: expected at least 1\n"
