"""MAGNET on eight devices, in one process or two, however they are laid out: the losses and adapters of one device."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convert.lora import load_lora
from seg4diff_jax.data.shapes import scene, write_folder
from tests.reference.magnet_runs import arguments, finish, rows, start

MORE = ["8x1x1", "1x8x1", "1x1x8", "4x2x1", "1x2x4"]
PARTS = ("loss", "velocity", "focal", "dice")


@pytest.fixture(scope="module")
def options(sd3_checkpoint, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("masks") / "folder"
    write_folder(folder, [scene("train", index, 64) for index in range(12)])
    return {
        "task": "magnet",
        "model": str(sd3_checkpoint),
        "block": 4,
        "remat": "nothing",
        "data.root": str(folder),
        "data.size": 64,
        "data.crop": "center",
        "data.rows": 4,
        "held_out.count": 2,
        "held_out.batch_size": 2,
        "lora.rank": 2,
        "run.steps": 3,
        "run.batch_size": 8,
        "run.log_every": 1,
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
    """The run of one device that is to be equalled, by the layout of the other one."""
    out = tmp_path_factory.mktemp("alone")

    def run(layout: str) -> Path:
        one = "1x1x1" + layout.removeprefix(layout.split(",")[0])
        if not (out / one).exists():
            finish(start("layouts", str(out), one, "--", *arguments(options)))
        return out / one

    return run


def share_cache(layouts: list[str], alone: Callable[[str], Path], target: Path) -> None:
    """One cache for all: rounded to fp16, encodings that differ in fp32's last digits can differ in fp16's."""
    for layout in layouts:
        if "cached" in layout and not (target / "cache").exists():
            shutil.copytree(alone(layout).parent / "cache", target / "cache")


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


@pytest.mark.parametrize(
    "wanted",
    [
        ["2x2x2", "1x2x4,cached"],
        pytest.param([*MORE, *(f"{each},cached" for each in MORE)], marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_every_layout_of_eight_devices_gives_the_losses_and_adapters_of_one(options, alone, tmp_path, wanted):
    share_cache(wanted, alone, tmp_path)
    (said,) = finish(start("layouts", str(tmp_path), *wanted, "--", *arguments(options), devices=8))
    parts = {row["layout"]: row["held"] for row in map(json.loads, said.splitlines())}
    assert list(parts) == wanted
    for layout, held in parts.items():
        assert_alike(tmp_path / layout, alone(layout))
        assert held.keys() == ({"transformer"} if "cached" in layout else {"transformer", "vae", "clip_l", "clip_g"})
        # Convolutions are split over `fsdp` alone; of the small models' norms, biases and tables more is whole.
        _, fsdp, tensor = map(int, layout.split(",")[0].split("x"))
        assert held["transformer"] <= 1 / (fsdp * tensor) + 0.1
        assert fsdp == 1 or max(held.values()) <= 1 / fsdp + 0.1, held


# ---- two processes --------------------------------------------------------------------------------------------------


def together(*command: str, compiled: Path | None = None) -> list:
    """The same command in two processes of four devices, joined on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    which = lambda number: joined | {"JAX_PROCESS_ID": str(number)}
    return [start(*command, "--distributed", devices=4, compiled=compiled, **which(number)) for number in range(2)]


@pytest.mark.parametrize(
    "layout",
    ["1x8x1", *(pytest.param(each, marks=pytest.mark.slow) for each in ("8x1x1", "1x1x8", "2x2x2", "1x8x1,cached"))],
)
def test_two_processes_of_four_devices_have_the_losses_and_adapters_of_one(options, alone, tmp_path, layout):
    share_cache([layout], alone, tmp_path)
    finish(*together("layouts", str(tmp_path), layout, "--", *arguments(options)))
    assert_alike(tmp_path / layout, alone(layout))
