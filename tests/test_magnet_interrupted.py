"""Whatever stops a MAGNET run, it goes on bit for bit: killed, told to stop, out of numbers or out of disk."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from seg4diff_jax.data.shapes import scene, write_folder
from seg4diff_jax.training.checkpoints import Checkpoints
from tests.reference.magnet_runs import arguments, finish, rows, start
from tests.test_magnet_sharded import together

STEPS = 20


@pytest.fixture(scope="module")
def options(sd3_checkpoint, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("masks") / "folder"
    write_folder(folder, [scene("train", index, 32) for index in range(9)])
    return {
        "task": "magnet",
        "model": str(sd3_checkpoint),
        "block": 4,
        "remat": "nothing",
        "data.root": str(folder),
        "data.size": 32,
        "data.rows": 4,
        "held_out.count": 0,
        "lora.rank": 16,
        "run.steps": STEPS,
        "run.batch_size": 2,
        "run.log_every": 1,
        "run.checkpoint_every": 10,
        "optimizer.learning_rate": 0.01,
        "optimizer.average": 0.9,
        "optimizer.accumulate": 2,
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def whole(options, compiled, tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(start("train", "--", *arguments(options | {"run.out": str(out)}), compiled=compiled))
    return out


def checkpointed(run: Path) -> list[int]:
    with Checkpoints(run, keep=9) as checkpoints:
        return checkpoints.steps


def state(run: Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint: adapters, average, both moments, counts, random key."""
    restored = ocp.StandardCheckpointer().restore((run / "checkpoints" / str(step) / "state").absolute())
    flat, _ = jax.tree.flatten_with_path(restored)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}


def assert_same(run: Path, other: Path, step: int = STEPS) -> None:
    ours, theirs = state(run, step), state(other, step)
    assert ours == theirs
    adapters = [name for name in ours if ".lora_" in name]
    assert len({name.split("'transformer")[0] for name in adapters}) >= 4, "adapters, average and two moments"
    exported = [load_file(each / "export/adapters.safetensors") for each in (run, other)]
    named = [{name: array.tobytes() for name, array in tensors.items()} for tensors in exported]
    assert named[0] == named[1]


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(options, compiled, whole, tmp_path):
    given = arguments(options | {"run.out": str(tmp_path)})
    finish(start("killed", "10", "--", *given, compiled=compiled), code=-signal.SIGKILL)
    assert checkpointed(tmp_path) == [10]
    finish(start("train", "--", *given, "--resume", compiled=compiled))
    assert_same(tmp_path, whole)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))
    logged = [[(row["loss"], row["gradient_norm"]) for row in rows(run)] for run in (tmp_path, whole)]
    assert logged[0] == logged[1]


def test_a_run_that_is_told_to_stop_checkpoints_and_goes_on_to_the_same_bytes(options, compiled, whole, tmp_path):
    given = arguments(options | {"run.out": str(tmp_path)})
    process = start("train", "--", *given, compiled=compiled)
    while not (tmp_path / "metrics.jsonl").is_file() or len(rows(tmp_path)) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process, seconds=60)
    (step,) = checkpointed(tmp_path)
    assert step == rows(tmp_path)[-1]["step"] < STEPS
    finish(start("train", "--", *given, "--resume", compiled=compiled))
    assert_same(tmp_path, whole)


def test_a_full_disk_stops_the_run_and_leaves_its_last_checkpoint(options, compiled, whole, tmp_path):
    given = arguments(options | {"run.out": str(tmp_path)})
    process = start("full", "10", "--", *given, compiled=compiled)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1, errors
    assert "a checkpoint could not be written" in errors
    assert "the one of step 10 is intact" in errors
    assert checkpointed(tmp_path) == [10]
    finish(start("train", "--", *given, "--resume", compiled=compiled))
    assert_same(tmp_path, whole)


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_pictures(options, tmp_path):
    endless = {"run.out": str(tmp_path), "run.checkpoint_every": 1, "optimizer.learning_rate": 1e38, "run.keep": 30}
    process = start("train", "--", *arguments(options | endless))
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1, errors
    (said,) = [line for line in errors.splitlines() if line.startswith("error:")]
    step = int(said.split("step ")[1].split(":")[0])
    assert "not finite" in said
    assert said.count(" (item ") == options["run.batch_size"]
    assert "Traceback" not in errors
    assert checkpointed(tmp_path) == list(range(1, step))
    adapters = [array for name, array in state(tmp_path, 1).items() if ".lora_" in name]
    assert all(np.isfinite(np.frombuffer(array, np.float32)).all() for array in adapters)


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_to_the_same_bytes(options, compiled, tmp_path):
    options = options | {"run.batch_size": 8, "run.mesh.fsdp": 8}
    given = lambda name: arguments(options | {"run.out": str(tmp_path / name)})
    finish(*together("train", "--", *given("whole"), compiled=compiled))
    for process in together("killed", "10", "--", *given("killed"), compiled=compiled):
        process.communicate(timeout=900)
        assert process.returncode < 0  # killed, or ended by JAX because the other one was
    finish(*together("train", "--", *given("killed"), "--resume", compiled=compiled))
    assert_same(tmp_path / "killed", tmp_path / "whole")
