"""The loop: what it learns, and that nothing which happens to it loses or changes a run."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from PIL import Image

from seg4diff_jax.command_line.tasks import TASKS
from seg4diff_jax.command_line.train import main
from seg4diff_jax.training.errors import TrainingError
from seg4diff_jax.training.logs import STRIP
from seg4diff_jax.training.loop import train
from seg4diff_jax.training.optimizers import OptimizerConfig
from seg4diff_jax.training.state import fresh
from seg4diff_jax.training.termination import Terminated
from tests.reference.processes import start, together
from tests.reference.run_files import bytes_of, checkpointed, rows_of
from tests.reference.small_training import OPTIMIZER, Net, Points, loss, make_run, make_task

ROOT = Path(__file__).parents[2]


def test_the_loss_falls_and_every_step_is_logged(tmp_path):
    train(make_task(), make_run(tmp_path, steps=60), OPTIMIZER, {"run": {"steps": 60}})
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 61))
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    first = {"step", "loss", "error", "gradient_norm", "learning_rate"}  # most of its time is compilation
    assert [row.keys() - first for row in rows] == [set()] + 59 * [{"images_per_second"}]
    assert first < rows[1].keys()
    assert (tmp_path / "config.yaml").read_text() == "run:\n  steps: 60\n"
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_each_evaluation_leaves_a_row_of_the_sheet_of_pictures(tmp_path):
    levels = iter([50, 100, 150, 200, 250])
    task = make_task(pictures=lambda model: np.full((7, 9, 3), next(levels), np.uint8))
    train(task, make_run(tmp_path), OPTIMIZER)
    assert [path.name for path in sorted((tmp_path / "pictures").iterdir())] == [
        f"{n:08d}.png" for n in (5, 10, 15, 20)
    ]
    sheet = np.asarray(Image.open(tmp_path / "pictures.png"))
    assert sheet.shape == (4 * (7 + STRIP), 9, 3)
    for number, level in enumerate((50, 100, 150, 200)):
        assert (sheet[(number + 1) * (7 + STRIP) - 7 : (number + 1) * (7 + STRIP)] == level).all()
    events = b"".join(file.read_bytes() for file in tmp_path.glob("events.out.tfevents.*"))
    assert all(file.read_bytes() in events for file in (tmp_path / "pictures").iterdir())


def test_what_a_run_that_was_cut_off_logged_goes_when_it_is_resumed(tmp_path):
    draw = lambda model: np.zeros((4, 4, 3), np.uint8)
    train(make_task(pictures=draw), make_run(tmp_path, steps=10), OPTIMIZER)
    (tmp_path / "pictures" / "00000013.png").write_bytes((tmp_path / "pictures" / "00000010.png").read_bytes())
    train(make_task(pictures=draw), make_run(tmp_path), OPTIMIZER, resume=True)
    assert sorted(int(path.stem) for path in (tmp_path / "pictures").iterdir()) == [5, 10, 15, 20]
    first, second = (path.read_bytes() for path in sorted(tmp_path.glob("events.out.tfevents.*")))
    start_at_11 = bytes([2 << 3, 11, 7 << 3 | 2, 2, 1 << 3, 1])  # Event.step, Event.session_log.status: START
    assert start_at_11 in second
    assert bytes([7 << 3 | 2, 2, 1 << 3, 1]) not in first


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, accumulate):
    optimizer = replace(OPTIMIZER, accumulate=accumulate)
    whole = train(make_task(), make_run(tmp_path / "whole"), optimizer)

    def stop(_):
        signal.raise_signal(signal.SIGTERM)
        return {}

    run = make_run(tmp_path / "parts", evaluate_every=7)
    train(make_task(evaluate=stop), run, optimizer)
    assert checkpointed(tmp_path / "parts")[-1] == 7
    parts = train(make_task(), run, optimizer, resume=True)
    assert bytes_of(parts) == bytes_of(whole)
    drop = {"images_per_second"}
    trained = [{k: v for k, v in row.items() if k not in drop} for row in rows_of(tmp_path / "parts")]
    assert [row for row in trained if "loss" in row] == [
        {k: v for k, v in row.items() if k not in drop} for row in rows_of(tmp_path / "whole")
    ]


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    whole = train(make_task(), make_run(tmp_path / "whole"), OPTIMIZER)
    killed = [sys.executable, "-m", "tests.reference.small_training", "dies", str(tmp_path / "killed")]
    assert subprocess.run(killed, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert checkpointed(tmp_path / "killed") in ([5], [5, 10]), "the last one may have been half written"
    resumed = train(make_task(), make_run(tmp_path / "killed"), OPTIMIZER, resume=True)
    assert bytes_of(resumed) == bytes_of(whole)
    assert [row["step"] for row in rows_of(tmp_path / "killed")] == list(range(1, 21)), "no step is logged twice"


def test_sigterm_does_not_wait_for_an_evaluation(tmp_path):
    """Whoever sends it kills 30 seconds later (Kubernetes; a preempted machine): the run has ended long before."""
    process = start("small_training", "evaluates", str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "evaluating\n"
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert time.monotonic() - sent < 30
    assert "stopped by SIGTERM after step 7, which is checkpointed" in said
    assert checkpointed(tmp_path) == [5, 7]


@pytest.mark.parametrize("within", ["evaluate", "pictures"])
def test_an_evaluation_that_sigterm_came_between_is_made_up_for(within, tmp_path):
    def told(_):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("unreachable")

    draw = lambda model: np.zeros((4, 4, 3), np.uint8)
    parts = {"evaluate": lambda _: {"score": 0.5}, "pictures": draw}
    task, run = make_task(**parts, best="score"), make_run(tmp_path, steps=5)
    train(replace(task, **{within: told}), run, OPTIMIZER)
    assert checkpointed(tmp_path) == [5]
    assert not (tmp_path / "pictures").exists()
    train(task, run, OPTIMIZER, resume=True)
    scores = [row["validation/score"] for row in rows_of(tmp_path) if "validation/score" in row]
    assert scores == [0.5]
    assert (tmp_path / "pictures").exists() == (within == "evaluate"), "scores were there, and nothing is due"


def test_what_an_interrupted_evaluation_makes_of_sigterm_is_no_failure(tmp_path):
    def converted(_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Terminated as told:
            raise OSError("something was interrupted") from told

    train(make_task(evaluate=converted), make_run(tmp_path), OPTIMIZER)
    assert checkpointed(tmp_path) == [5]


def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path):
    first, second = together("small_training", "told", str(tmp_path), devices=1)
    said = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], said
    (step,) = checkpointed(tmp_path)
    assert 7 < step < 5000
    assert f"stopped by SIGTERM after step {step}, which is checkpointed" in said[0]


def test_sigterm_before_the_first_step_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    def told(*_):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("unreachable")

    with pytest.raises(Terminated):
        train(make_task(init=told), make_run(tmp_path / "run"), OPTIMIZER)
    assert checkpointed(tmp_path / "run") == []
    monkeypatch.setitem(TASKS, "magnet", TASKS["magnet"]._replace(make=told))
    assert main(["--task=magnet", "--model=m", f"--run.out={tmp_path}", "--run.steps=1", "--run.batch_size=1"]) == 0
    assert capsys.readouterr().err == "stopped by SIGTERM before a step was taken\n"


def test_settings_that_do_not_fit_are_refused_before_anything_is_read(capsys):
    """There is no such model."""
    options = ["--task=magnet", "--model=m", "--run.out=x", "--run.steps=5", "--run.batch_size=1"]
    assert main([*options, "--optimizer.warmup=5"]) == 1
    assert capsys.readouterr().err == "error: optimizer.warmup is 5; expected less than the run's 5 steps\n"


def test_a_run_is_not_overwritten_by_another(tmp_path):
    train(make_task(), make_run(tmp_path, steps=5), OPTIMIZER)
    with pytest.raises(TrainingError, match="holds a run, checkpointed at step 5: give --resume"):
        train(make_task(), make_run(tmp_path, steps=5), OPTIMIZER)


def test_a_refused_resume_leaves_the_runs_own_configuration(tmp_path):
    train(make_task(), make_run(tmp_path, steps=5), OPTIMIZER, {"optimizer": {"accumulate": 1}})
    twice = replace(OPTIMIZER, accumulate=2)
    with pytest.raises(
        TrainingError, match=r"accumulate is 2, .* counts its steps by 1 batches each|cannot be resumed"
    ):
        train(make_task(), make_run(tmp_path), twice, {"optimizer": {"accumulate": 2}}, resume=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"optimizer": {"accumulate": 1}}


def test_steps_of_another_number_of_batches_are_not_gone_on_with(tmp_path):
    by = lambda count: (replace(OPTIMIZER, accumulate=count), {"optimizer": {"accumulate": count}})
    train(make_task(), make_run(tmp_path, steps=5), *by(2))
    with pytest.raises(TrainingError, match="accumulate is 4, and the run's checkpoint counts its steps by 2 batches"):
        train(make_task(), make_run(tmp_path), *by(4), resume=True)


def test_an_evaluation_that_fails_loses_no_step(tmp_path):
    def broken(_):
        raise ValueError("no such picture")

    with pytest.raises(ValueError, match="no such picture"):
        train(make_task(evaluate=broken), make_run(tmp_path, checkpoint_every=20), OPTIMIZER)
    assert checkpointed(tmp_path) == [5]
    whole = train(make_task(), make_run(tmp_path / "whole"), OPTIMIZER)
    assert bytes_of(train(make_task(), make_run(tmp_path), OPTIMIZER, resume=True)) == bytes_of(whole)


@pytest.mark.parametrize("name", ["steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every", "keep"])
def test_counts_of_a_run_that_are_zero_are_refused(name):
    with pytest.raises(ValueError, match=f"run.{name} is 0; expected at least 1"):
        make_run("somewhere", **{name: 0})


def test_a_loss_that_is_no_number_stops_and_names_step_and_items(tmp_path):
    with pytest.raises(TrainingError) as caught:
        train(make_task(source=Points(broken=(11,))), make_run(tmp_path, checkpoint_every=1, keep=100), OPTIMIZER)
    message = str(caught.value)
    assert "point 11" in message
    assert "loss and gradient_norm not finite" in message
    step = int(message.split("step ")[1].split(":")[0])
    assert checkpointed(tmp_path) == list(range(1, step))
    train(make_task(), make_run(tmp_path), OPTIMIZER, resume=True)


def test_a_full_disk_stops_and_leaves_the_last_checkpoint(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(_):
        while not (tmp_path / "checkpoints" / "5").exists():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))  # files can no longer grow past this
        return {}

    wide = lambda rngs: Net(rngs, width=20_000)
    run = make_run(tmp_path, evaluate_every=10)
    try:
        with pytest.raises(TrainingError, match=r"could not be written .* the one of step 5 is intact"):
            train(make_task(init=fresh(wide), evaluate=fill), run, OPTIMIZER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpointed(tmp_path) == [5]
    train(make_task(init=fresh(wide)), run, OPTIMIZER, resume=True)
    assert checkpointed(tmp_path)[-1] == 20


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    scores = iter([0.1, 0.9, 0.3, 0.4])
    task = make_task(evaluate=lambda _: {"score": next(scores)}, best="score")
    train(task, make_run(tmp_path, keep=1), OPTIMIZER)
    assert checkpointed(tmp_path) == [10, 20]


def test_a_resumed_run_keeps_the_best_of_before(tmp_path):
    scores = iter([0.9, 0.1, 0.3, 0.4])
    task = make_task(evaluate=lambda _: {"score": next(scores)}, best="score")
    train(task, make_run(tmp_path, keep=1, steps=10), OPTIMIZER)
    assert checkpointed(tmp_path) == [5, 10]
    train(task, make_run(tmp_path, keep=1), OPTIMIZER, resume=True)
    assert checkpointed(tmp_path) == [5, 20]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(make_task(), make_run(tmp_path, steps=5), OPTIMIZER)
    with pytest.raises(TrainingError, match="5 cannot be resumed with this configuration"):
        train(make_task(init=fresh(lambda rngs: Net(rngs, width=3))), make_run(tmp_path), OPTIMIZER, resume=True)


def test_accumulated_batches_equal_one_larger_batch(tmp_path):
    task = make_task(loss=loss)
    optimizer = OptimizerConfig(learning_rate=0.02, schedule="constant", average=0.5)
    large = train(task, make_run(tmp_path / "large", batch_size=8), optimizer)
    small = train(task, make_run(tmp_path / "small", batch_size=4), replace(optimizer, accumulate=2))
    for one, other in zip(jax.tree.leaves(nnx.state(large)), jax.tree.leaves(nnx.state(small)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_only_trainable_parameters_change_or_are_checkpointed(tmp_path):
    task = make_task(trainable=nnx.PathContains("down"))
    before = fresh(Net)(0, jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor")))
    after = train(task, make_run(tmp_path, steps=5), replace(OPTIMIZER, average=None))
    assert np.array_equal(before.up.kernel[...], after.up.kernel[...])
    assert not np.array_equal(before.down.kernel[...], after.down.kernel[...])
    metadata = (tmp_path / "checkpoints" / "5" / "state" / "_METADATA").read_text()
    assert "down.kernel" in metadata
    assert "up.kernel" not in metadata


def test_the_export_is_given_the_average(tmp_path):
    given = []
    task = make_task(loss=loss, export=lambda model, directory: given.append((model, directory)))
    model = train(task, make_run(tmp_path), OPTIMIZER)
    assert given[0][1] == tmp_path / "export"
    assert bytes_of(given[0][0]) == bytes_of(model)
    plain = train(task, make_run(tmp_path / "plain"), replace(OPTIMIZER, average=None))
    assert bytes_of(plain) != bytes_of(model)
