"""Measure a small model on a folder in a process of its own: on all its devices, or until it is killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from seg4diff_jax.evaluation.benchmarks import folder_benchmark
from seg4diff_jax.evaluation.hosts import local_mesh
from seg4diff_jax.evaluation.measure import Measurement, Settings
from seg4diff_jax.evaluation.outcome import Outcome
from seg4diff_jax.evaluation.progress import Progress
from seg4diff_jax.loading import load


def measured(model: str, root: str, batch_size: int) -> Outcome:
    """Block 0 at noise level 8, seed 5, the classes that are present."""
    settings = Settings(blocks=(0,), steps=(8,), seeds=(5,), batch_size=batch_size)
    pipe = load(model, mesh=local_mesh(), blocks=1)
    return Measurement(pipe, folder_benchmark(root), settings).outcome()


def write(model: str, root: str, batch_size: str, target: str) -> None:
    """What was counted, as a file."""
    Path(target).write_bytes(measured(model, root, int(batch_size)).to_bytes())


def killed(*options: str) -> None:
    """`evaluate.py` that is killed once it has saved its second shard."""
    from seg4diff_jax.evaluation.command import main

    save = Progress.save

    def dying(self: Progress, number: int, outcome: Outcome) -> None:
        save(self, number, outcome)
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.save = dying
    main(options)


if __name__ == "__main__":
    {"write": write, "killed": killed}[sys.argv[1]](*sys.argv[2:])
