"""One evaluation: a model on a benchmark, and what is reported of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

from seg4diff_jax.evaluation.batches import Example, assemble
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.measure import Measurement, Settings, Told
from seg4diff_jax.evaluation.outcome import Outcome
from seg4diff_jax.evaluation.pictured import Why, pictured
from seg4diff_jax.evaluation.progress import Progress
from seg4diff_jax.evaluation.rows import baseline_rows, score_rows, unsupervised_baselines, unsupervised_rows
from seg4diff_jax.evaluation.scores import Row, Setting, best_setting
from seg4diff_jax.evaluation.zero_shot import Pass
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.segmentation.open_vocabulary import upsampled_labels


@dataclass(frozen=True)
class Shown:
    """One image of the data set for people to look at.

    Attributes:
      example: the image, its labels and name; `image` are its pixels as they are.
      predicted: class of every pixel.
      classes: those that were asked for; `scores` are theirs, on the grid of image tokens.
      accuracy: percent of the labelled pixels that are right.
      why: it is shown: see `pictured`.
    """

    example: Example
    image: np.ndarray
    predicted: Int[np.ndarray, "height width"]
    classes: tuple[int, ...]
    scores: Float[np.ndarray, "classes rows columns"]
    accuracy: float
    why: Why


@dataclass(frozen=True)
class Evaluation:
    """What came out. Rows are plain values, scores in percent; `seconds` are compiling and running.

    Attributes:
      rows: one for each kind of prompts, block, step and seed; after them those of segments without names, one for
        each threshold, block, step and seed.
      baselines: guessers on the same images, `baseline` says which: see `rows`.
      best: what has the highest mIoU, of segments without names only where nothing was asked for.
      shown: the best images, some at random and the worst, segmented at `best`; none without names.
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


def evaluate(
    pipe: Pipeline,
    benchmark: Benchmark,
    settings: Settings,
    *,
    shown: int = 0,
    progress: Told = lambda done, miou: None,
    kept: Progress | None = None,
) -> Evaluation:
    """Zero-shot scores of a model on a benchmark. All processes take part, and hear the same figures.

    Args:
      shown: how many images to segment once more, for people to look at: in the first process.
      progress: told how many images are done.
      kept: where the first process keeps what is counted, and finds what an interrupted run has counted.

    Raises:
      ImageError, FolderError: an image or a label is not usable.
      ValueError: class names do not make prompts, no image is left, or the interrupted run was another one.
      FloatingPointError: scores are not finite.
    """
    measurement = Measurement(pipe, benchmark, settings)
    outcome = measurement.outcome(told=progress, kept=kept)
    left = {why: [each.message for each in outcome.left_out if each.why == why] for why in ("skipped", "unlabelled")}
    if not len(outcome.indices):
        first = f"; the first: {left['skipped'][0]}" if left["skipped"] else ""
        raise ValueError(
            f"{benchmark.where}: no image is left to score: {len(left['unlabelled'])} without a labelled pixel, "
            f"{len(left['skipped'])} skipped{first}"
        )
    rows = [*score_rows(outcome, measurement), *unsupervised_rows(outcome, measurement)]
    baselines = [*baseline_rows(outcome, measurement), *unsupervised_baselines(outcome, measurement)]
    best = best_setting(rows)
    compiling, running = outcome.seconds.tolist()
    seconds = {"compiling": compiling, "running": running}
    pictures, confusion = [], None
    if settings.prompts:
        confusion = _confusion(measurement, outcome, best)
        pictures = _shown(measurement, outcome, best, shown) if shown and not jax.process_index() else []
    return Evaluation(rows, baselines, best, pictures, left["skipped"], left["unlabelled"], seconds, confusion)


def _confusion(measurement: Measurement, outcome: Outcome, best: Setting) -> Int[np.ndarray, "classes classes"]:
    settings, counting = measurement.settings, measurement.zero_shot
    passes = [counting.passes.index(Pass(best.step, seed, best.prompts)) for seed in settings.seeds]
    return outcome.counted.confusion[passes, settings.blocks.index(best.block)].sum(axis=0)


def _shown(measurement: Measurement, outcome: Outcome, best: Setting, count: int) -> list[Shown]:
    """The images that `pictured` names, by the pixels that are right at the first seed."""
    settings, counting = measurement.settings, measurement.zero_shot
    one, place = Pass(best.step, settings.seeds[0], best.prompts), settings.blocks.index(best.block)
    right = outcome.counted.right[counting.passes.index(one), place]
    accuracy = 100 * right / outcome.histograms.sum(axis=1)
    chosen = pictured(accuracy, outcome.histograms, count)
    found: list[Shown] = []
    for start in range(0, len(chosen), settings.batch_size):
        found += _segmented(measurement, chosen[start : start + settings.batch_size], outcome, accuracy, one, place)
    return found


def _segmented(
    measurement: Measurement,
    chosen: Sequence[tuple[int, Why]],
    outcome: Outcome,
    accuracy: Float[np.ndarray, " images"],
    one: Pass,
    place: int,
) -> list[Shown]:
    examples = [measurement.reader.example(int(outcome.indices[number])) for number, _ in chosen]
    asked = measurement.asked[one.prompts]
    batch = assemble(examples, measurement.settings.batch_size, asked)
    found: list[Shown] = []
    scores = measurement.zero_shot.scores(batch, one)[place]
    for (number, why), example, grid in zip(chosen, examples, scores, strict=False):
        classes, _ = asked(example)
        grid = grid[: len(classes)]
        predicted = np.array(classes, np.int32)[upsampled_labels(grid, example.labels.shape)]
        image = measurement.benchmark.source[example.index]["image"]
        if one.prompts == "all":  # of the whole vocabulary only what is there, or is said to be there
            kept = [at for at, label in enumerate(classes) if label in {*example.present, *np.unique(predicted)}]
            classes, grid = tuple(classes[at] for at in kept), grid[kept]
        found.append(Shown(example, image, predicted, classes, grid, float(accuracy[number]), why))
    return found
