"""Measure a model on a folder in a process of its own: on all its devices and on one, or until it is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from seg4diff_jax.checkpoints import load
from seg4diff_jax.evaluation.batches import assemble
from seg4diff_jax.evaluation.benchmarks import folder_benchmark, open_benchmark
from seg4diff_jax.evaluation.counts import Counts
from seg4diff_jax.evaluation.measurement import Measurement, Settings
from seg4diff_jax.evaluation.options import AVERAGE_PRECISION, METRICS, BackgroundOptions, Data
from seg4diff_jax.evaluation.resumption import Progress
from seg4diff_jax.evaluation.unsupervised import Look, permuted_tokens
from seg4diff_jax.evaluation.zero_shot import Pass, without_images
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.processes import local_mesh
from seg4diff_jax.segmentation.unsupervised_scores import UnsupervisedProtocol

WITHOUT_NAMES = (UnsupervisedProtocol(0.02), UnsupervisedProtocol(0.1, "token", "row", absent_classes=True))


def measured(
    pipe: Pipeline,
    root: str,
    batch_size: int,
    *,
    block: int = 0,
    step: int = 8,
    unsupervised: Sequence[UnsupervisedProtocol] = WITHOUT_NAMES,
    **further: Any,
) -> Counts:
    """One block at one noise level, seed 5: the classes that are present, and segments without names.

    Args:
      further: other settings.
    """
    settings = Settings((block,), (step,), (5,), batch_size, unsupervised=tuple(unsupervised), **further)
    return Measurement(pipe, folder_benchmark(root), settings).outcome()


def settled(pipe: Pipeline, root: str, *, block: int, step: int) -> list[UnsupervisedProtocol]:
    """Leave out of a folder's labels what rounding can decide about, in maps and in what guesses.

    Returns `WITHOUT_NAMES` at the nearest thresholds that no divergence comes near.
    """
    # Not at the top: the process that is killed needs no PyTorch.
    from tests.reference.ties import ignore, undecided
    from tests.reference.unsupervised import IGNORED, distributions, merged, threshold_near

    measurement = Measurement(pipe, folder_benchmark(root), Settings((block,), (step,), (5,), 1))
    asked, forward = measurement.asked["present"], measurement.forward
    every: list[tuple[Path, np.ndarray]] = []
    attention = []
    for index, file in enumerate(sorted((Path(root) / "labels").iterdir())):
        batch = assemble([measurement.reader.example(index)], 1, asked)
        latents = forward.latents(batch.pixels)
        scores = measurement.zero_shot.scores(batch, Pass(step, 5))[0]
        maps = measurement.unsupervised._maps(latents, batch, Look(step, 5))
        grid, size = forward.grid(latents), tuple(batch.sizes[0].tolist())
        present = (batch.class_of_row[0] != IGNORED)[: scores.shape[1]]
        guessed = without_images(scores.reshape(1, 1, scores.shape[1], -1), batch.indices, 5)
        named = [each[0, present] for each in (scores, *(np.asarray(one).reshape(scores.shape) for one in guessed))]
        ties = np.any([undecided(each, size) for each in named], axis=0)
        permuted = permuted_tokens(maps[0][:, None].swapaxes(-1, -2), batch.indices, 5).swapaxes(-1, -2)
        attention.append([np.asarray(each)[0, 0] for each in (maps, permuted)])
        every.append((file, ties))
    protocols = [
        replace(one, threshold=threshold_near(one.threshold, *(distributions(a, one.minmax) for a, _ in attention)))
        for one in WITHOUT_NAMES
    ]
    for (file, ties), both in zip(every, attention, strict=True):
        for one, each in product(protocols, both):
            segments = merged(each, one.threshold, one.minmax).reshape(-1, *grid)
            ties = ties | undecided(segments, size)
        ignore(file, ties, few=0.05)  # of six readings
    return protocols


def spread(root: str, target: str) -> None:
    """The miniature on all devices, then on one of them at the same batch size and at 1: what was counted, as files."""
    mesh = local_mesh()
    assert mesh is not None
    read, one = {"block": 3, "step": 3}, load("miniature", blocks=4)
    protocols = settled(one, root, **read)
    for name, where, batch_size in (("spread", mesh, mesh.size), ("alone", None, mesh.size), ("one by one", None, 1)):
        pipe = one if where is None else load("miniature", mesh=where, blocks=4)
        further = {"prompts": ("present", "decoys"), "metrics": METRICS}
        outcome = measured(pipe, root, batch_size, **read, unsupervised=protocols, **further)
        (Path(target) / name).write_bytes(outcome.to_bytes())


def objects(root: str, target: str) -> None:
    """The miniature on a set of named objects, on all devices and on one of them: what was counted, as files."""
    mesh = local_mesh()
    assert mesh is not None
    data = Data(name="imagenet-segmentation", root=root)
    for thresholds in ((), ("mean",)):
        benchmark = open_benchmark(data, 64, background=BackgroundOptions(competitors="sky,ground"))
        settings = Settings((3,), (3,), (5,), mesh.size, thresholds=thresholds, metrics=(AVERAGE_PRECISION,))
        for name, where in (("spread", mesh), ("alone", None)):
            outcome = Measurement(load("miniature", mesh=where, blocks=4), benchmark, settings).outcome()
            (Path(target) / f"{name}{len(thresholds)}").write_bytes(outcome.to_bytes())


def killed(*options: str) -> None:
    """`evaluate.py` that is killed once it has saved its second shard."""
    from seg4diff_jax.command_line.evaluate import main

    save = Progress.save

    def dying(self: Progress, number: int, outcome: Counts) -> None:
        save(self, number, outcome)
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.save = dying
    main(options)


if __name__ == "__main__":
    {"spread": spread, "objects": objects, "killed": killed}[sys.argv[1]](*sys.argv[2:])
