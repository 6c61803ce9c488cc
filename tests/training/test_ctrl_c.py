"""Ctrl-C while a run trains: its step is kept, it says how to go on, and the second time it ends at once."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seg4diff_jax.command_line.tasks import TASKS
from seg4diff_jax.command_line.train import main
from seg4diff_jax.training.loop import train
from seg4diff_jax.training.termination import UNDER_WAY, Terminated
from tests.reference.processes import start, together
from tests.reference.run_files import bytes_of, checkpointed, rows_of
from tests.reference.small_training import OPTIMIZER, make_run, make_task

ROOT = Path(__file__).parents[2]
AUTOENCODER = {
    "config": str(ROOT / "configs" / "miniature" / "autoencoder.yaml"),
    "run.steps": 100000,
    "run.batch_size": 8,
    "run.log_every": 1,
    "run.workers": 2,
    "optimizer.warmup": 3,
    "data.size": 32,
    "data.train": 64,
    "data.validation": 20,
    "data.cache": "null",
    "dtype": "float32",
    "model.block_out_channels": [8, 8],
    "model.norm_num_groups": 4,
}


def press(_) -> dict[str, float]:
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("unreachable")


def test_a_run_that_ctrl_c_stopped_goes_on_to_the_same_bytes(tmp_path):
    whole = train(make_task(), make_run(tmp_path / "whole"), OPTIMIZER)
    before = signal.getsignal(signal.SIGINT)
    run = make_run(tmp_path / "parts", evaluate_every=7)
    with pytest.raises(
        KeyboardInterrupt, match=r"^stopped by Ctrl-C after step 7, which is checkpointed in .*/7: go on"
    ):
        train(make_task(evaluate=press), run, OPTIMIZER)
    assert checkpointed(tmp_path / "parts") == [5, 7]
    assert signal.getsignal(signal.SIGINT) is before
    assert bytes_of(train(make_task(), run, OPTIMIZER, resume=True)) == bytes_of(whole)


def test_ctrl_c_before_the_first_step_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    with pytest.raises(Terminated):
        train(make_task(init=lambda *_: press(None)), make_run(tmp_path / "run"), OPTIMIZER)
    assert checkpointed(tmp_path / "run") == []
    monkeypatch.setitem(TASKS, "magnet", TASKS["magnet"]._replace(make=press))
    assert main(["--task=magnet", "--model=m", f"--run.out={tmp_path}", "--run.steps=1", "--run.batch_size=1"]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C before a step was taken\n"


def test_ctrl_c_in_the_last_step_stops_nothing_that_is_left_to_do(tmp_path):
    """It comes while the last step's scores are computed: the step is kept, and what the run is for is written."""
    exported = []
    task = make_task(evaluate=press, export=lambda _, directory: exported.append(directory))
    with pytest.raises(KeyboardInterrupt):
        train(task, make_run(tmp_path, steps=5), OPTIMIZER)
    assert checkpointed(tmp_path) == [5]
    assert exported == [tmp_path / "export"]


def run_until_told(out: Path, options: list[str], by: signal.Signals, rows: int) -> tuple[int, str, int]:
    """`train.py` in a session of its own, told by a signal once its log has so many rows.

    Ctrl-C goes to the processes that prepare data too, as from a terminal.

    Returns the exit status, standard error, and the last step in the log.
    """
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *options],
        cwd=out.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (out / "metrics.jsonl").exists() or len(rows_of(out)) < rows:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    tell = os.killpg if by is signal.SIGINT else os.kill
    tell(process.pid, by)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors, rows_of(out)[-1]["step"]


def test_ctrl_c_at_a_terminal_keeps_the_step_and_says_what_goes_on_with_it_until_sigterm(tmp_path):
    out = tmp_path / "a run"
    options = [f"--{name}={value}" for name, value in (AUTOENCODER | {"run.out": str(out)}).items()]
    status, errors, step = run_until_told(out, options, signal.SIGINT, 2)
    assert status == 130, errors
    assert "Traceback" not in errors
    (said,) = [line for line in errors.splitlines() if line.startswith("stopped by")]
    assert said.startswith(f"stopped by Ctrl-C after step {step}, which is checkpointed in {out}/checkpoints/{step}: ")
    command = re.search(r"go on with python train\.py (.*)", said)
    assert command is not None
    status, errors, last = run_until_told(out, shlex.split(command[1]), signal.SIGTERM, len(rows_of(out)) + 1)
    assert status == 0, errors
    assert last > step
    assert max(checkpointed(out)) == last
    assert f"stopped by SIGTERM after step {last}, which is checkpointed" in errors


def test_a_second_ctrl_c_ends_at_once_without_a_traceback(tmp_path):
    process = start("small_training", "exports", str(tmp_path))
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "exporting\n"
    process.send_signal(signal.SIGINT)
    while (line := process.stderr.readline().strip()) != UNDER_WAY:
        assert process.poll() is None, line
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in errors
    assert checkpointed(tmp_path)[-1] == 20


def test_ctrl_c_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path):
    first, second = together("small_training", "told", str(tmp_path), "SIGINT", devices=1)
    try:
        said = [process.communicate(timeout=120)[1] for process in (first, second)]
    finally:
        first.kill()
        second.kill()
    (step,) = checkpointed(tmp_path)
    assert 7 < step < 5000
    assert first.returncode == 0, said[0]
    assert f"stopped by SIGTERM after step {step}, which is checkpointed" in said[0]
    assert second.returncode == 130, said[1]
    assert f"stopped by Ctrl-C after step {step}, which is checkpointed" in said[1]


# ---- nothing to go on from ------------------------------------------------------------------------------------------


def test_resuming_where_there_is_nothing_tells_what_there_is(tmp_path, capsys):
    train(make_task(), make_run(tmp_path / "mine", steps=5), OPTIMIZER)
    (tmp_path / "another").mkdir()
    train(make_task(), make_run(tmp_path / "mien", steps=3), OPTIMIZER, resume=True)
    said = f"{tmp_path / 'mien'} does not exist. To go on with a run beside it, stop this one and give "
    assert f"{said}--run.out={tmp_path / 'mine'} (step 5)\n" in capsys.readouterr().err


def test_resuming_a_directory_without_checkpoints_tells_what_it_holds(tmp_path, capsys):
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text(json.dumps({}) if name == "config.yaml" else "")
    train(make_task(), make_run(tmp_path, steps=3), OPTIMIZER, resume=True)
    said = capsys.readouterr().err
    assert f"the run begins anew: {tmp_path} holds config.yaml and metrics.jsonl, and no checkpoint" in said


def test_resuming_what_is_finished_tells_that_nothing_is_left(tmp_path, capsys):
    train(make_task(), make_run(tmp_path, steps=5), OPTIMIZER)
    train(make_task(), make_run(tmp_path, steps=5), OPTIMIZER, resume=True)
    assert "all 5 steps are taken: for more of them give a larger --run.steps" in capsys.readouterr().err
