"""`seg4diff reproduce`: a page of all findings, an interrupted run that goes on, the plan, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from seg4diff_jax.command_line import main, reproduction
from seg4diff_jax.evaluation.expert import name_expert
from seg4diff_jax.miniature.world.shapes import scene, write_folder
from seg4diff_jax.reproduction import run
from seg4diff_jax.reproduction.parts import Part, Step
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


def test_a_complete_run_leaves_nothing_of_its_progress_and_is_not_gone_on_with(interrupted_and_resumed, given, capsys):
    assert not (interrupted_and_resumed / "progress").exists()
    assert main([*given, "--out", str(interrupted_and_resumed), "--resume"]) == 1
    assert "is complete: there is nothing to --resume" in capsys.readouterr().err


class Fake:
    """Steps that measure how often they were asked, and write a picture."""

    def __init__(self):
        self.asked: dict[str, int] = {}

    def steps(self, failing: str | None = None) -> tuple[Step, ...]:
        return tuple(self.step(each, failing) for each in ("one", "two", "three"))

    def step(self, name: str, failing: str | None) -> Step:
        def measure(subject, folder: Path, on_progress) -> dict:
            if name == failing:
                raise OSError("no space left on the device")
            self.asked[name] = self.asked.get(name, 0) + 1
            Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
            return {"asked": self.asked[name], "prompts": list(subject.prompts)}

        present = lambda subject, found: Part(name, str(found[name]), pictures=[(name, f"{name}.png")])
        return Step(name, name, measure, present, (f"{name}.png",))


@pytest.fixture
def stopped(given, tmp_path, monkeypatch) -> tuple[Fake, Path, Callable[..., int]]:
    """A run that failed in its last step, and a function that starts it again with further arguments."""
    fake, out = Fake(), tmp_path / "out"

    def start(*more: str, failing: str | None = None) -> int:
        for module in (run, reproduction):
            monkeypatch.setattr(module, "STEPS", fake.steps(failing))
        return main([*given, "--out", str(out), *more])

    assert start(failing="three") == 1
    return fake, out, start


def test_what_is_damaged_or_gone_is_measured_again(stopped):
    fake, out, start = stopped
    (out / "one.png").unlink()
    (out / "progress" / "two.json").write_text('{"step": "two", "fou')
    assert start("--resume") == 0
    assert fake.asked == {"one": 2, "two": 2, "three": 1}


def test_a_run_that_is_begun_anew_measures_everything(stopped):
    fake, out, start = stopped
    assert start("--overwrite", "--count", "2", "--seeds", "2") == 0
    assert fake.asked == {"one": 2, "two": 2, "three": 1}
    assert json.loads((out / "reproduction.json").read_text())["measured"]["one"]["asked"] == 2


def test_a_run_with_other_options_or_prompts_is_not_gone_on_with(stopped, given, capsys):
    fake, _, start = stopped
    assert start("--resume", "--seeds", "2") == 1
    assert "is of a run with other options: seeds was 1 and is 2" in capsys.readouterr().err
    file = Path(given[given.index("--prompts") + 1])
    written = file.read_text()
    try:
        file.write_text("a cat on the grass\ntwo blue buses\n")
        assert start("--resume") == 1
    finally:
        file.write_text(written)
    assert "prompt 2 was 'two red buses' and is 'two blue buses'" in capsys.readouterr().err
    assert fake.asked == {"one": 1, "two": 1}


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
        ({"--count": "1"}, "--count is 1: expected at least 2 prompts"),
        ({"--prompts": "/dev/null"}, "/dev/null is empty: expected a prompt a line"),
        ({"--clip": None, "--dino": "somewhere"}, "--dino scores beside a CLIP, and"),
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
