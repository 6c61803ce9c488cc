"""Whatever stops a MAGNET run, it goes on bit for bit: killed, told to stop, out of numbers or out of disk."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from seg4diff_jax.command_line.train import main
from seg4diff_jax.convert.__main__ import main as convert
from seg4diff_jax.convert.lora.run import arrays_of
from seg4diff_jax.training.checkpoints import Checkpoints
from tests.reference.magnet_runs import arguments, rows, small_run
from tests.reference.processes import finish, start, together

STEPS, BATCH = 8, 2


@pytest.fixture(scope="module")
def options(sd3_checkpoint, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("masks") / "folder"
    return small_run(sd3_checkpoint, folder, 9, 32) | {
        "held_out.count": 0,
        "lora.rank": 16,
        "run.steps": STEPS,
        "run.batch_size": BATCH,
        "run.checkpoint_every": 4,
        "optimizer.learning_rate": 0.01,
        "optimizer.average": 0.9,
        "optimizer.accumulate": 2,
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """Programs, which are kept by what is compiled, with which options and for what: a run finds those of its like."""
    return tmp_path_factory.mktemp("programs")


def checkpointed(run: Path) -> list[int]:
    with Checkpoints(run, keep=9) as checkpoints:
        return checkpoints.steps


def state(run: Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint: adapters, average, both moments, counts, random key."""
    flat, _ = jax.tree.flatten_with_path(arrays_of((run / "checkpoints" / str(step) / "state").absolute()))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}


def assert_same(run: Path, other: Path, step: int = STEPS) -> None:
    ours, theirs = state(run, step), state(other, step)
    assert ours == theirs
    adapters = [name for name in ours if ".lora_" in name]
    assert len({name.split("'transformer")[0] for name in adapters}) >= 4, "adapters, average and two moments"
    exported = [named_bytes(each / "export/adapters.safetensors") for each in (run, other)]
    assert exported[0] == exported[1]


def named_bytes(file: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_file(file).items()}


class Stopped(NamedTuple):
    """A run that something stopped after its checkpoint of step 4, with its exit status, its last words, and what of
    checkpoints it left."""

    run: Path
    code: int
    errors: str
    left: list[int]


@pytest.fixture(scope="module")
def begun(options, compiled, tmp_path_factory) -> dict[str, Stopped]:
    """Runs of one process, the first of which nothing stopped; the process is killed with the last."""
    out = tmp_path_factory.mktemp("begun")
    process = start("magnet_runs", "stopped", str(out), "4", "--", *arguments(options), compiled=compiled)
    _, errors = process.communicate(timeout=900)
    said = {name: out / f"{name}.stderr" for name in ("whole", "told", "full", "killed")}
    words = [file.read_text() for file in said.values() if file.is_file()]
    assert len(words) == len(said), [each[-6000:] for each in (errors, *words)]
    status = lambda file: int(file.read_text()) if file.is_file() else process.returncode
    return {
        name: Stopped(out / name, status(out / f"{name}.status"), file.read_text(), checkpointed(out / name))
        for name, file in said.items()
    }


@pytest.fixture(scope="module")
def whole(begun) -> Path:
    """A run that nothing stopped."""
    assert begun["whole"].code == 0, begun["whole"].errors[-6000:]
    return begun["whole"].run


@pytest.fixture(scope="module")
def stopped(options, compiled, begun) -> dict[str, Stopped]:
    """Those of the runs that something stopped, which another process has resumed."""
    found = {name: run for name, run in begun.items() if name != "whole"}
    runs = [str(each.run) for each in found.values()]
    finish(start("magnet_runs", "resume", *runs, "--", *arguments(options), compiled=compiled))
    return found


def test_a_checkpoint_gives_the_adapters_that_the_export_has(whole, tmp_path):
    """Those of the average, which an export is of."""
    ours = ["--to", "native", "--checkpoint"]
    assert convert(["lora", str(whole), str(tmp_path / "last.safetensors"), *ours, "last"]) == 0
    assert convert(["lora", str(whole), str(tmp_path / "4.safetensors"), *ours, "4"]) == 0
    exported = named_bytes(whole / "export" / "adapters.safetensors")
    assert named_bytes(tmp_path / "last.safetensors") == exported
    assert named_bytes(tmp_path / "4.safetensors") != exported


def test_a_damaged_array_of_a_checkpoint_is_refused_by_name(whole, tmp_path, capsys):
    """Here its checksum is what has changed; `tests/convert/test_run_checkpoints.py` changes the array."""
    run = shutil.copytree(whole, tmp_path / "run")
    kept = run / "checkpoints" / "8" / "checksums" / "metadata"
    checksums = json.loads(kept.read_text())
    name = next(name for name in checksums["arrays"] if name.startswith("average/"))
    other = checksums["arrays"][name].translate(str.maketrans("01", "10")) + "0"
    kept.write_text(json.dumps({**checksums, "arrays": checksums["arrays"] | {name: other}}))
    convert_it = lambda step: convert(["lora", str(run), str(tmp_path / f"{step}.safetensors"), "--checkpoint", step])
    assert convert_it("last") == 1
    said = capsys.readouterr().err
    assert f"checkpoints/8/state is damaged: of step 8 {name} is not what was written" in said
    assert "The run's other checkpoints: 4" in said
    assert not (tmp_path / "last.safetensors").exists()
    assert convert_it("4") == 0


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(stopped, whole):
    killed = stopped["killed"]
    assert (killed.code, killed.left) == (-signal.SIGKILL, [4])
    assert_same(killed.run, whole)
    assert [row["step"] for row in rows(killed.run)] == list(range(1, STEPS + 1))
    logged = [[(row["loss"], row["gradient_norm"]) for row in rows(run)] for run in (killed.run, whole)]
    assert logged[0] == logged[1]


def test_a_run_that_is_told_to_stop_checkpoints_and_goes_on_to_the_same_bytes(stopped, whole):
    told = stopped["told"]
    assert (told.code, told.left) == (0, [4, 5])
    assert "stopped by SIGTERM after step 5, which is checkpointed" in told.errors
    assert_same(told.run, whole)


def test_a_full_disk_stops_the_run_and_leaves_its_last_checkpoint(stopped, whole):
    full = stopped["full"]
    assert (full.code, full.left) == (1, [4]), full.errors
    assert "a checkpoint could not be written" in full.errors
    assert "the one of step 4 is intact" in full.errors
    assert_same(full.run, whole)


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_pictures(options, tmp_path, capsys):
    endless = {"run.out": str(tmp_path), "run.checkpoint_every": 1, "optimizer.learning_rate": 1e38, "run.keep": 30}
    code = main(arguments(options | endless))
    errors = capsys.readouterr().err
    assert code == 1, errors
    (said,) = [line for line in errors.splitlines() if line.startswith("error:")]
    step = int(said.split("step ")[1].split(":")[0])
    assert "not finite" in said
    assert said.count(" (item ") == BATCH
    assert "Traceback" not in errors
    assert checkpointed(tmp_path) == list(range(1, step))
    adapters = [array for name, array in state(tmp_path, 1).items() if ".lora_" in name]
    assert all(np.isfinite(np.frombuffer(array, np.float32)).all() for array in adapters)


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_to_the_same_bytes(options, compiled, tmp_path):
    options = options | {"run.batch_size": 8, "run.mesh.fsdp": 8}
    given = lambda name: arguments(options | {"run.out": str(tmp_path / name)})
    two = lambda *command: together("magnet_runs", *command, devices=4, compiled=compiled)
    finish(*two("train", "--", *given("whole")))
    for process in two("killed", "4", "--", *given("killed")):
        process.communicate(timeout=600)
        assert process.returncode < 0  # killed, or ended by JAX because the other one was
    finish(*two("train", "--", *given("killed"), "--resume"))
    assert_same(tmp_path / "killed", tmp_path / "whole")
