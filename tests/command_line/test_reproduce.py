"""`seg4diff reproduce`: a page of all findings, an interrupted run that goes on, the plan, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from seg4diff_jax.command_line import main
from seg4diff_jax.evaluation.expert import name_expert
from seg4diff_jax.miniature.world.shapes import scene, write_folder
from seg4diff_jax.reproduction import run
from tests.reference.browser import BROWSER, browser
from tests.reference.checkpoints import make_checkpoint

SIDE = 32


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """A small random model that names an expert block, labelled images and prompts."""
    folder = tmp_path_factory.mktemp("reproduce")
    model = make_checkpoint(folder / "model", t5=False, sample_size=SIDE // 8)
    name_expert(str(model), 2, 8)
    write_folder(folder / "data", (scene("test", index, SIDE) for index in range(3)))
    (folder / "prompts.txt").write_text("a cat on the grass\ntwo red buses\n")
    sizes = ["--images", "2", "--count", "2", "--seeds", "1", "--batch", "2"]
    data = ["--data.root", str(folder / "data"), "--prompts", str(folder / "prompts.txt")]
    return ["reproduce", "--model", str(model), *data, *sizes, "--clip", "miniature"]


@pytest.fixture(scope="module")
def interrupted_and_resumed(given, tmp_path_factory) -> Path:
    """A run that failed in the step of the masks and went on, where the steps before it would have failed."""
    out, names = tmp_path_factory.mktemp("out") / "page", [step.name for step in run.STEPS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "STEPS", with_failing(["masks"]))
        assert main([*given, "--out", str(out)]) == 1
    assert not (out / "reproduction.html").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "STEPS", with_failing(names[: names.index("masks")]))
        assert main([*given, "--out", str(out), "--resume"]) == 0
    return out


def with_failing(names: list[str]) -> tuple[Step, ...]:
    def fail(*_):
        raise OSError("no space left on the device")

    return tuple(step._replace(measure=fail) if step.name in names else step for step in run.STEPS)


def test_a_run_that_was_interrupted_goes_on_without_measuring_again(interrupted_and_resumed):
    record = json.loads((interrupted_and_resumed / "reproduction.json").read_text())
    assert [*record["measured"]] == [step.name for step in run.STEPS if step.measure is not None]
    assert len(record["findings"]) > 15
    assert {claim["verdict"] for claim in record["findings"]} <= {"holds", "does not hold", "not testable here"}


def test_without_adapters_of_its_own_magnet_is_not_testable(interrupted_and_resumed):
    record = json.loads((interrupted_and_resumed / "reproduction.json").read_text())
    (claim,) = [claim for claim in record["findings"] if "MAGNET" in claim["paper"]]
    assert claim["verdict"] == "not testable here"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_stands_alone_and_shows_every_part(interrupted_and_resumed):
    page = (interrupted_and_resumed / "reproduction.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    with browser() as opened:
        shown = opened.new_page(viewport={"width": 1280, "height": 900})
        told: list[str] = []
        shown.on("console", lambda message: told.append(message.text))
        shown.goto(f"file://{interrupted_and_resumed / 'reproduction.html'}")
        headings = shown.locator("h2").all_inner_texts()
        assert len(headings) == 1 + len(run.STEPS)
        assert shown.evaluate("document.documentElement.scrollWidth") <= 1280
        assert told == []


def test_a_run_with_other_options_is_not_gone_on_with(interrupted_and_resumed, given, capsys):
    (interrupted_and_resumed / "reproduction.json").rename(interrupted_and_resumed / "kept.json")
    try:
        assert main([*given, "--out", str(interrupted_and_resumed), "--resume", "--seeds", "2"]) == 1
    finally:
        (interrupted_and_resumed / "kept.json").rename(interrupted_and_resumed / "reproduction.json")
    assert "is of a run with other options: seeds was 1 and is 2" in capsys.readouterr().err


def test_the_plan_says_what_the_run_needs_and_ends(given, tmp_path, capsys):
    assert main([*given, "--plan", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    # 2 prompts, 2 images, 6 blocks and levels: 2 x 28 x 2 + 2 + 2 x 7 x 28 x (2 + 3) + 2 x 6 x 2 + 2
    assert "2,100 forward passes at 32 x 32 pixels" in told
    assert "attention and value norms 112, principal components 2, perturbed and guided pictures 1,960" in told
    assert "GB of weights in float32" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--prompts": None}, "prompts are needed for pictures: --prompts FILE"),
        ({"--data.root": None}, "labelled images are needed: --data.name and --data.root"),
        ({"--images": "0"}, "--images is 0: expected at least 1"),
        ({"--prompts": "/dev/null"}, "/dev/null has no prompt: expected one a line"),
        ({"--clip": None, "--dino": "somewhere"}, "--dino scores beside a CLIP: name one with --clip"),
        ({"--data.root": "absent"}, "absent"),
    ],
)
def test_what_does_not_fit_gets_one_sentence(given, changed, message, tmp_path, capsys):
    pairs = dict(zip(given[1::2], given[2::2], strict=True)) | changed
    arguments = [each for option, value in pairs.items() if value is not None for each in (option, value)]
    assert main(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_a_model_without_an_expert_block_is_refused(given, sd3_checkpoint, tmp_path, capsys):
    arguments = list(given)
    arguments[arguments.index("--model") + 1] = str(sd3_checkpoint)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert "does not say which block segments best" in capsys.readouterr().err
