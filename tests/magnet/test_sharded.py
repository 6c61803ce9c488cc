"""MAGNET on eight devices, in one process or two, however they are laid out: the losses and adapters of one device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from seg4diff_jax.convert.lora.adapters import load_lora
from tests.reference.magnet_runs import arguments, rows, small_run
from tests.reference.processes import finish, start, together

LAYOUTS = ["2x2x2", "8x1x1", "1x8x1", "1x1x8", "4x2x1", "1x2x4"]
PARTS = ("loss", "velocity", "focal", "dice")


@pytest.fixture(scope="module")
def options(sd3_checkpoint, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("masks") / "folder"
    return small_run(sd3_checkpoint, folder, 12, 64) | {
        "data.crop": "center",
        "held_out.count": 2,
        "held_out.batch_size": 2,
        "lora.rank": 2,
        "run.steps": 3,
        "run.batch_size": 8,
        "run.evaluate_every": 3,
        "run.checkpoint_every": 2,
        "run.keep": 5,
        "optimizer.learning_rate": 0.5,
        "optimizer.schedule": "constant",
        "optimizer.average": 0.9,
        # So large that updates are as large as gradients: otherwise Adam makes the rounding errors of small ones large.
        "optimizer.epsilon": 100.0,
    }


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory) -> Callable[[str], Path]:
    """The run of one device that is to be equalled, by the layout of the other one: without a cache, or from one."""
    out = tmp_path_factory.mktemp("alone")
    finish(start("magnet_runs", "layouts", str(out), "1x1x1", "1x1x1,cached", "--", *arguments(options)))
    return lambda layout: out / ("1x1x1,cached" if "cached" in layout else "1x1x1")


def share_cache(alone: Callable[[str], Path], target: Path) -> None:
    """One cache for all: rounded to fp16, encodings that differ in fp32's last digits can differ in fp16's."""
    shutil.copytree(alone("cached").parent / "cache", target / "cache")


def assert_alike(found: Path, expected: Path) -> None:
    ours, theirs = rows(found), rows(expected)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in PARTS if "loss" in other else ("validation/velocity_loss", "validation/base_velocity_loss"):
            np.testing.assert_allclose(one[name], other[name], rtol=2e-5, err_msg=f"{name}, step {one['step']}")
        if "loss" not in other:
            assert one["validation/miou"] == pytest.approx(other["validation/miou"], abs=0.2)
    assert_adapters_alike(found / "export", expected / "export")


def assert_adapters_alike(found: Path, expected: Path) -> None:
    adapters, wanted = load_lora(found)[1], load_lora(expected)[1]
    assert adapters.keys() == wanted.keys()
    for name, pair in wanted.items():
        for factor, ours in zip(pair, adapters[name], strict=True):
            assert np.abs(ours - factor).max() <= 1e-4 * np.abs(factor).max(), name


def assert_split(said: str, layouts: list[str]) -> None:
    """No device holds more of the frozen models than its layout leaves it."""
    ours = [json.loads(line) for line in said.splitlines() if line.startswith("{")]  # Gloo speaks too
    parts = {row["layout"]: row["held"] for row in ours}
    assert list(parts) == layouts
    for layout, held in parts.items():
        assert held.keys() == ({"transformer"} if "cached" in layout else {"transformer", "vae", "clip_l", "clip_g"})
        # Convolutions are split over `fsdp` alone; of the small models' norms and biases more is whole, and of the
        # CLIPs their tables, 0.42 of them, whose 725 and 77 rows divide by none of the sizes.
        _, fsdp, tensor = map(int, layout.split(",")[0].split("x"))
        assert held["transformer"] <= 1 / (fsdp * tensor) + 0.1
        for name, share in held.items():
            clip = name.startswith("clip")
            assert share <= (1 / (fsdp * tensor) + 0.42 if clip else 1 / fsdp + 0.1), held


@pytest.fixture(scope="module")
def found(options, alone, tmp_path_factory) -> tuple[Path, list[str]]:
    """Runs of eight devices side by side, of one process and of two, and what each process said of them."""
    out = tmp_path_factory.mktemp("found")
    share_cache(alone, out)
    how = "magnet_runs", "layouts", str(out)
    two = together(*how, "2x2x2", "--", *arguments(options), devices=4)
    return out, finish(start(*how, "2x2x2,cached", "--", *arguments(options), devices=8), *two)


def test_eight_devices_give_the_losses_and_adapters_of_one_from_a_cache(found, alone):
    out, (said, *_) = found
    assert_split(said, ["2x2x2,cached"])
    assert_alike(out / "2x2x2,cached", alone("cached"))


def test_two_processes_of_four_devices_give_the_losses_scores_and_adapters_of_one(found, alone):
    out, (_, *both) = found
    for said in both:
        assert_split(said, ["2x2x2"])
    assert_alike(out / "2x2x2", alone("2x2x2"))


@pytest.mark.slow
@pytest.mark.parametrize("cached", ["", ",cached"])
def test_every_layout_of_eight_devices_gives_the_losses_and_adapters_of_one(options, alone, tmp_path, cached):
    share_cache(alone, tmp_path)
    wanted = [layout + cached for layout in LAYOUTS]
    (said,) = finish(
        start("magnet_runs", "layouts", str(tmp_path), *wanted, "--", *arguments(options), devices=8), seconds=1800
    )
    assert_split(said, wanted)
    for layout in wanted:
        assert_alike(tmp_path / layout, alone(layout))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["8x1x1", "1x8x1", "1x1x8", "1x8x1,cached"])
def test_two_processes_of_every_layout_give_the_losses_and_adapters_of_one(options, alone, tmp_path, layout):
    share_cache(alone, tmp_path)
    for said in finish(
        *together("magnet_runs", "layouts", str(tmp_path), layout, "--", *arguments(options), devices=4)
    ):
        assert_split(said, [layout])
    assert_alike(tmp_path / layout, alone(layout))
