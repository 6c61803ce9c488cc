"""One evaluation: a model on a benchmark, and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Int

from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.counts import Counts
from seg4diff_jax.evaluation.gallery import Shown, ShownSegments, shown_by_name, shown_segments
from seg4diff_jax.evaluation.measurement import Measurement, OnImages, Settings
from seg4diff_jax.evaluation.resumption import Progress
from seg4diff_jax.evaluation.rows import Row, Setting, best_setting
from seg4diff_jax.evaluation.scores import baseline_rows, score_rows, unsupervised_baselines, unsupervised_rows
from seg4diff_jax.evaluation.zero_shot import Pass
from seg4diff_jax.numerics import settled
from seg4diff_jax.pipeline import Pipeline


@dataclass(frozen=True)
class Evaluation:
    """What came out. Scores are in percent; `seconds` are compiling and running.

    Attributes:
      rows: one for each kind of prompts, block, head, step and seed; after them those of segments without names, one
        for each threshold, block, head, step and seed.
      baselines: guessers on the same images; `baseline` says which.
      best: what has the highest mIoU, of segments without names only where nothing was asked for.
      shown: the best images, some at random and the worst, segmented at `best`; none without names.
      divided: the same of segments without names, at what has the highest mIoU of them.
      confusion: pixels of each class (rows) that are taken for each class, at `best`, over all seeds; None where
        segments have no names.
    """

    rows: list[Row]
    baselines: list[Row]
    best: Setting
    shown: list[Shown]
    skipped: list[str]
    unlabelled: list[str]
    seconds: dict[str, float]
    confusion: Int[np.ndarray, "classes classes"] | None = None
    divided: list[ShownSegments] = field(default_factory=list)


@settled()
def evaluate(
    pipe: Pipeline,
    benchmark: Benchmark,
    settings: Settings,
    *,
    shown: int = 0,
    on_progress: OnImages = lambda done, miou: None,
    kept: Progress | None = None,
) -> Evaluation:
    """Zero-shot scores of a model on a benchmark. All processes take part, and hear the same figures.

    Args:
      shown: how many images to segment once more, for people to look at: in the first process.
      on_progress: receives how many images are done.
      kept: where the first process keeps what is counted, and finds what an interrupted run has counted.

    Raises:
      ImageError, FolderError: an image or a label is not usable.
      ValueError: class names do not make prompts, no image is left, or the interrupted run was another one.
      FloatingPointError: scores are not finite.
    """
    measurement = Measurement(pipe, benchmark, settings)
    outcome = measurement.outcome(on_progress=on_progress, kept=kept)
    left = {why: [each.message for each in outcome.left_out if each.why == why] for why in ("skipped", "unlabelled")}
    if not len(outcome.indices):
        first = f"; the first: {left['skipped'][0]}" if left["skipped"] else ""
        raise ValueError(
            f"{benchmark.where}: no image is left to score: {len(left['unlabelled'])} without a labelled pixel, "
            f"{len(left['skipped'])} skipped{first}"
        )
    without_names = unsupervised_rows(outcome, measurement)
    rows = [*score_rows(outcome, measurement), *without_names]
    baselines = [*baseline_rows(outcome, measurement), *unsupervised_baselines(outcome, measurement)]
    best = best_setting(rows)
    compiling, running = outcome.seconds.tolist()
    seconds = {"compiling": compiling, "running": running}
    confusion = _confusion(measurement, outcome, best) if settings.prompts else None
    pictures, divided = [], []
    if shown and not jax.process_index():
        pictures = shown_by_name(measurement, outcome, best, shown) if settings.prompts else []
        divided = shown_segments(measurement, outcome, best_setting(without_names), shown) if without_names else []
    left_out = left["skipped"], left["unlabelled"]
    return Evaluation(rows, baselines, best, pictures, *left_out, seconds, confusion, divided)


def _confusion(measurement: Measurement, outcome: Counts, best: Setting) -> Int[np.ndarray, "classes classes"]:
    settings, counting = measurement.settings, measurement.zero_shot
    passes = [counting.passes.index(Pass(best.step, seed, best.prompts)) for seed in settings.seeds]
    return outcome.counted.confusion[passes, settings.readings.index(best.reading)].sum(axis=0)
