"""Measure a model on a folder in a process of its own: on all its devices and on one, or until it is killed."""

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
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.segmentation.unsupervised_scores import UnsupervisedProtocol

WITHOUT_NAMES = (UnsupervisedProtocol(0.02), UnsupervisedProtocol(0.1, "token", "row", absent_classes=True))


def measured(pipe: Pipeline, root: str, batch_size: int, *, block: int = 0, step: int = 8) -> Outcome:
    """One block at one noise level, seed 5: the classes that are present, and segments without names."""
    settings = Settings((block,), (step,), (5,), batch_size, unsupervised=WITHOUT_NAMES)
    return Measurement(pipe, folder_benchmark(root), settings).outcome()


def spread(root: str, target: str) -> None:
    """The miniature on all devices, then on one of them at the same batch size and at 1: what was counted, as files."""
    mesh = local_mesh()
    assert mesh is not None
    for name, where, batch_size in (("spread", mesh, mesh.size), ("alone", None, mesh.size), ("one by one", None, 1)):
        pipe = load("miniature", mesh=where, blocks=4)
        outcome = measured(pipe, root, batch_size, block=3, step=3)
        (Path(target) / name).write_bytes(outcome.to_bytes())


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
    {"spread": spread, "killed": killed}[sys.argv[1]](*sys.argv[2:])
