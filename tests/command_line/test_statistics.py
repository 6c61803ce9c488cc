"""`seg4diff analyze --statistics`: a page and figures of every block, of images and of generating runs."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.analysis.prompt_statistics import on_pictures, while_generating
from seg4diff_jax.analysis.summary import summarize
from seg4diff_jax.command_line import main
from seg4diff_jax.evaluation.benchmarks import folder_benchmark
from seg4diff_jax.evaluation.measurement import Settings
from seg4diff_jax.evaluation.run import evaluate
from tests.reference.inputs import SQUARE, an_image

PROMPTS = ["a cat by the sea", "two red buses"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three labelled images; one shows no class."""
    root = tmp_path_factory.mktemp("labelled")
    for name in ("images", "labels"):
        (root / name).mkdir()
    (root / "classes.txt").write_text("cat\nsea\ngrass\n")
    for index, present in enumerate(([0, 2], [255], [1])):
        Image.fromarray(an_image(SQUARE, SQUARE, index)).save(root / "images" / f"{index}.png")
        labels = np.resize(np.array(present, np.uint8), (SQUARE, SQUARE))
        Image.fromarray(labels).save(root / "labels" / f"{index}.png")
    return root


def levels_of(out) -> dict:
    return json.loads((out / "statistics.json").read_text())["levels"]


def assert_summarized(written: dict, found) -> None:
    summary = summarize(found)
    assert written["samples"] == summary.samples
    assert written["candidates"] == summary.candidates
    for name, (mean, deviation) in summary.quantities.items():
        np.testing.assert_allclose(np.array(written["blocks"][name]["mean"], float), mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            np.array(written["blocks"][name]["deviation"], float), deviation, rtol=1e-3, atol=1e-5
        )


def test_generating_runs_of_a_file_of_prompts_are_looked_at_in_their_steps(sd3, sd3_checkpoint, tmp_path, capsys):
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("\n".join([*PROMPTS, "never reached"]) + "\n")
    command = ["analyze", "--prompts", str(file), "--count", "2", "--seeds", "2", "--seed", "3", "--steps", "4"]
    assert main([*command, "--at-steps", "4", "1", "--statistics", str(out), "--model", str(sd3_checkpoint)]) == 0
    found = [
        while_generating(sd3, [prompt], at_steps=(1, 4), steps=4, guidance=7.5, seed=seed, first=place)
        for place, prompt in enumerate(PROMPTS)
        for seed in (3, 4)
    ]
    written = levels_of(out)
    assert list(written) == ["1", "4"]
    for place, level in enumerate(written):
        assert_summarized(written[level], [statistics[place] for statistics, _ in found])
    page = (out / "statistics.html").read_text()
    assert all(text in page for text in ("Noise level 1 of 4", "Noise level 4 of 4", "4 generating runs, 2 seeds"))
    assert page.count("<img") == 4
    assert re.search(
        r"noise level 1: block by hint: most on text \d, most on words \d, largest", capsys.readouterr().out
    )


def test_images_of_a_folder_are_asked_for_the_classes_that_they_show(sd3, sd3_checkpoint, folder, tmp_path):
    out = tmp_path / "out"
    assert main(["analyze", str(folder), "--statistics", str(out), "--step", "5", "--model", str(sd3_checkpoint)]) == 0
    shown = [(0, "cat grass"), (2, "sea")]
    images = [np.asarray(Image.open(folder / "images" / f"{index}.png")) for index, _ in shown]
    each = zip(images, shown, strict=True)
    found = [on_pictures(sd3, [image], [prompt], step=5, first=place) for image, (place, prompt) in each]
    (level,) = levels_of(out).values()
    settings = Settings(tuple(range(sd3.transformer.depth)), (5,), (0,), batch_size=3)
    scores = {row.block: row.metrics.miou for row in evaluate(sd3, folder_benchmark(folder), settings).rows}
    assert level["mean IoU by labels, %"] == pytest.approx([scores[block] for block in range(len(scores))], abs=0.05)
    assert level["candidates"].pop("best mIoU by labels") == np.argmax(level["mean IoU by labels, %"])
    assert_summarized(level, found)


def test_one_image_and_one_prompt_have_figures_too(sd3_checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["analyze", str(folder / "images" / "0.png"), "--prompt", "a cat", "--statistics"]
    assert main([*command, "--model", str(sd3_checkpoint), "--at-steps", "28"]) == 0
    (out,) = (tmp_path / "runs" / "analyze").iterdir()
    assert out.name.startswith("0-")
    assert levels_of(out)["28"]["samples"] == 1
    page = (out / "statistics.html").read_text()
    assert "Mean ±" not in page
    assert "1 noised images" not in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "without an image, say what to generate: --prompt or --prompts FILE: found neither"),
        (["--prompt", "a", "--prompts", "{file}"], "say what to generate: --prompt or --prompts FILE: found both"),
        (["{image}", "--prompts", "{file}"], "--prompts is for generating runs: leave out the image"),
        (["{image}"], "say what is in the image, CLASS... or --prompt: found neither"),
        (["{folder}", "--prompt", "a cat"], "the prompt of a folder's image is its own classes: leave out"),
        (["--prompts", "{empty}"], "empty.txt"),
        (["--prompts", "{folder}/none.txt"], "none.txt"),
        (["--prompt", "a cat", "--steps", "4", "--at-steps", "5"], "--at-steps names 5: expected 1"),
        (["--prompt", "a cat", "--steps", "0"], "steps is 0"),
        (["--prompt", "a cat", "--seeds", "0"], "--seeds is 0: expected at least 1"),
        (["--prompts", "{file}", "--count", "0"], "--count is 0: expected at least 1"),
        (["--prompt", "a cat", "--count", "2"], "--count is of a folder or of --prompts: this is one sample"),
        (["--prompt", "a cat", "--step", "3"], "a generating run is looked at in --at-steps: leave out --step"),
        (["{image}", "cat", "--step", "3", "--at-steps", "5"], "--step and --at-steps both name noise levels"),
        (["{image}", "cat", "--guidance", "3"], "--guidance is of generating runs: leave out the image"),
        (["--prompt", "a cat", "--block", "0"], "by itself: leave out --block"),
        (["--prompt", "a cat", "--block", "1"], "--statistics is of all blocks, by itself: leave out --block"),
        (["--prompt", "a cat", "--find-expert"], "by itself: leave out --find-expert"),
        (["--prompt", "a cat", "--components"], "by itself: leave out --components"),
    ],
)
def test_what_has_no_statistics_is_told(sd3_checkpoint, folder, tmp_path, options, message, capsys):
    places = {"file": tmp_path / "prompts.txt", "empty": tmp_path / "empty.txt", "folder": folder}
    places["image"] = folder / "images" / "0.png"
    places["file"].write_text("a cat\n")
    places["empty"].write_text("")
    given = [option.format(**places) for option in options]
    out = ["--statistics", str(tmp_path / "out"), "--model", str(sd3_checkpoint)]
    assert main(["analyze", *given, *out]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ").replace("  ", " ")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_told_by_its_option(sd3_checkpoint, folder, capsys):
    image, model = str(folder / "images" / "0.png"), ["--model", str(sd3_checkpoint)]
    assert main(["analyze", "--statistics", image, "--prompt", "a cat", *model]) == 1
    assert "is a file: put the image before --statistics" in capsys.readouterr().err.replace("\n", " ")
    assert main(["analyze", image, "--prompt", "a cat", "--statistics", str(folder), *model]) == 1
    assert f"--statistics {folder} is not empty" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    "option", [["--prompts", "a.txt"], ["--at-steps", "3"], ["--count", "2"], ["--seeds", "2"], ["--steps", "3"]]
)
def test_options_of_statistics_are_refused_without_them(sd3_checkpoint, folder, option, capsys):
    image = str(folder / "images" / "0.png")
    assert main(["analyze", image, "cat", "--find-expert", *option, "--model", str(sd3_checkpoint)]) == 1
    assert f"{option[0]} is of --statistics" in capsys.readouterr().err.replace("\n", " ")
