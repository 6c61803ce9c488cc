"""What a run says: what it does before its first step, that step as soon as it is taken, and what comes after it."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest

from seg4diff_jax import command_line
from seg4diff_jax.command_line.train import main
from seg4diff_jax.convert.lora.adapters import read_lora
from seg4diff_jax.evaluation import options as evaluation
from seg4diff_jax.training import stages
from seg4diff_jax.training.loop import train
from tests.reference.magnet_runs import arguments, small_run
from tests.reference.run_files import rows_of
from tests.reference.small_training import OPTIMIZER, make_run, make_task


class Parsed(Exception):
    """Raised in place of what a command does."""


@pytest.fixture(scope="module")
def said(sd3_checkpoint, tmp_path_factory) -> list[str]:
    """The lines of a MAGNET run from a cache."""
    directory = tmp_path_factory.mktemp("said")
    options = small_run(sd3_checkpoint, directory / "a folder", 6, 32) | {
        "held_out.count": 2,
        "cache": str(directory / "cache"),
        "data.crop": "center",
        "run.steps": 3,
        "run.batch_size": 2,
        "run.log_every": 2,
        "run.out": str(directory / "a run"),
        "optimizer.warmup": 1,
    }
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(stages.Console, "print", lambda _, text, **__: lines.append(text))
        assert main(arguments(options)) == 0
    return lines


def place(lines: list[str], pattern: str) -> int:
    (found,) = [number for number, line in enumerate(lines) if re.search(pattern, line)]
    return found


def test_what_comes_before_the_first_step_is_said_as_it_begins_and_with_its_seconds(said):
    stages_of_it = [
        "reading what .*a folder holds",
        "loading .*'s autoencoder and text encoders, float32",
        "encoding 4 pictures, once, into .*cache",
        "encoding 2 held-out pictures",
        "loading .*'s transformer, float32",
    ]
    places = [place(said, f"^{each}{end}$") for each in stages_of_it for end in (r" \.\.\.", r": \d+\.\d s")]
    assert places == sorted(places)
    assert places[-1] < place(said, "compiling the training step for .*, and taking the first one") < len(said)


def test_the_first_step_is_shown_before_its_turn_in_the_log(said):
    taken = place(said, r"MAGNET: step 1 took \d+\.\d s, of which compiling took \d+\.\d s")
    first, second = place(said, r"step 1 of 3  loss [\d.]+ "), place(said, "step 2 of 3  loss")
    assert taken < first < second


def test_the_first_step_that_is_logged_anyway_is_shown_once(tmp_path, capsys):
    train(make_task(), make_run(tmp_path, steps=3), OPTIMIZER)
    assert capsys.readouterr().err.count("step 1 of 3") == 1
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_a_run_ends_with_where_its_adapters_are_and_commands_that_take_them(said, monkeypatch):
    export = re.match("MAGNET: wrote (.*/export); checkpoints in .*/checkpoints, logs in .*/metrics.jsonl$", said[-3])
    assert export is not None
    assert read_lora(export[1]).adapters
    commands = [line.split(":  ", 1)[1] for line in said[-2:]]
    (program, *words), (python, script, *scored) = map(shlex.split, commands)
    assert (program, python, script) == ("seg4diff", "python", "evaluate.py")
    assert evaluation.parse(scored).lora == export[1]
    assert evaluation.parse(scored).blocks == 4

    def parsed(options):
        assert options.lora == export[1]
        assert options.block == 4
        assert len(options.classes) > 1, "one class alone would be everywhere"
        raise Parsed

    segment = command_line.COMMANDS["segment"]._replace(run=parsed)
    monkeypatch.setitem(command_line.COMMANDS, "segment", segment)
    with pytest.raises(Parsed):
        command_line.main(words)


def test_a_long_stage_counts(monkeypatch, capsys):
    monkeypatch.setattr(stages, "EVERY", 0)
    batches = [{"x": np.zeros((3, 2))}, {"x": np.zeros((1, 2))}]
    assert list(stages.counted(iter(batches), 4, "pictures encoded")) == batches
    assert capsys.readouterr().err == "3 of 4 pictures encoded\n4 of 4 pictures encoded\n"


def test_a_stage_that_fails_is_not_said_to_have_taken_its_time(capsys):
    with pytest.raises(ValueError, match="no such"), stages.stage("loading it"):
        raise ValueError("no such thing")
    assert capsys.readouterr().err == "loading it ...\n"
