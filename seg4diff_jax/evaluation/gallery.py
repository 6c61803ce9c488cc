"""Chooses the best, worst and random images for the report, and segments them again to show their masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Integer

from seg4diff_jax.data.single_objects import BACKGROUND, FOREGROUND
from seg4diff_jax.evaluation.background import above_mean
from seg4diff_jax.evaluation.batches import Example, assemble
from seg4diff_jax.evaluation.counts import Counts
from seg4diff_jax.evaluation.measurement import Measurement, of_one_size
from seg4diff_jax.evaluation.options import MEAN, Threshold
from seg4diff_jax.evaluation.rows import Setting
from seg4diff_jax.evaluation.unsupervised import Look
from seg4diff_jax.evaluation.vocabulary import each_class_once
from seg4diff_jax.evaluation.zero_shot import Pass
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions
from seg4diff_jax.segmentation.open_vocabulary import best_classes, edges_of, upsampled_labels
from seg4diff_jax.segmentation.unsupervised_scores import matched_pairs
from seg4diff_jax.segmentation.unsupervised_tally import tables

Why = Literal["best", "random", "worst"]
SEED = 0


def pictured(
    accuracy: Float[np.ndarray, " images"], histograms: Int[np.ndarray, "images classes"], count: int
) -> list[tuple[int, Why]]:
    """Chooses `count` images: a third the best, a third the worst, and a third at random from the others.

    The order is best, random, worst; within each third from better to worse. The random draw depends on the number of
    images alone. An image of one class is always right if its prompt names just that class. Such an image is among the
    best only if there are no others.

    Args:
      accuracy: percent of each image's counted pixels that are right; NaN if none is counted: the image is not chosen.
      histograms: number of counted pixels of each class in each image.
      count: number of images to choose; all if there are fewer.
    """
    count = min(count, int(np.isfinite(accuracy).sum()))
    present = (histograms > 0).sum(axis=1)
    order = np.lexsort((np.arange(len(accuracy)), -present, -accuracy, present < 2)).tolist()
    order = [image for image in order if np.isfinite(accuracy[image])]
    random = count // 3
    worst = (count - random) // 2
    best = count - random - worst
    at_bottom = sorted(order[best:], key=lambda image: accuracy[image])[:worst]
    between = [image for image in order[best:] if image not in set(at_bottom)]
    drawn = [between[place] for place in np.random.default_rng(SEED).permutation(len(between))[:random]]
    kinds: dict[Why, list[int]] = {"best": order[:best], "random": drawn, "worst": at_bottom}
    return [(image, why) for why, some in kinds.items() for image in sorted(some, key=lambda each: -accuracy[each])]


UNMATCHED = -1


@dataclass(frozen=True)
class Shown:
    """One image of the report, segmented by class names.

    Attributes:
      example: the image, its labels and its name.
      image: the pixels at their own resolution.
      predicted: the predicted class of every pixel.
      classes: the classes that the prompts name.
      scores: scores of these classes, on the grid of image tokens.
      accuracy: percent of the labelled pixels that are right.
      why: the reason for which `pictured` chose the image.
      papers: the class of every pixel by the paper's masks, where `predicted` is refined.
    """

    example: Example
    image: np.ndarray
    predicted: Int[np.ndarray, "height width"]
    classes: tuple[int, ...]
    scores: Float[np.ndarray, "classes rows columns"]
    accuracy: float
    why: Why
    papers: Int[np.ndarray, "height width"] | None = None


@dataclass(frozen=True)
class ShownSegments:
    """One image of the report, in segments without names.

    Attributes:
      example, image, why: as for `Shown`.
      segments: the segment of every pixel.
      owners: the class that each segment is matched with, `UNMATCHED` for none; always from a match of the whole image.
      accuracy: percent of the labelled pixels that are right by the scored match, which may be row by row.
    """

    example: Example
    image: np.ndarray
    segments: Int[np.ndarray, "height width"]
    owners: Int[np.ndarray, " segments"]
    accuracy: float
    why: Why


def shown_by_name(measurement: Measurement, outcome: Counts, best: Setting, count: int) -> list[Shown]:
    """Returns the images that `pictured` chooses by accuracy at the first seed, segmented by class names."""
    settings, counting = measurement.settings, measurement.zero_shot
    one, reading = Pass(best.step, settings.seeds[0], best.prompts), settings.readings.index(best.reading)
    accuracy = _percent(outcome.counted.right[counting.passes.index(one), reading], outcome)
    asked, chosen = measurement.asked[best.prompts], pictured(accuracy, outcome.histograms, count)
    papers = best.readout._replace(refined=False)
    at, before = settings.readouts.index(best.readout), settings.readouts.index(papers) if best.refined else None
    found: dict[int, Shown] = {}
    for numbers, why, examples in _batches(measurement, outcome, chosen):
        scores = counting.scores(assemble(examples, settings.batch_size, asked, settings.prior), one)
        for place, (number, reason, example) in enumerate(zip(numbers, why, examples, strict=True)):
            classes, prompts = asked(example)
            wordless = len(classes) > len(prompts.classes)
            label = partial(_labelled, classes=classes, wordless=wordless, example=example, threshold=best.threshold)
            grid = scores[at, place, : len(classes)].copy()
            predicted = label(grid, masks=settings.masks if best.refined else PAPERS_MASKS)
            plain = None if before is None else label(scores[before, place, : len(classes)].copy(), masks=PAPERS_MASKS)
            if wordless:
                grid[-1] = -grid[:-1].max(axis=0)  # below the scores of competitors, if there are any
            classes, grid = each_class_once(classes, grid)
            if best.prompts == "all":  # keep only classes that are present or predicted
                kept = [row for row, each in enumerate(classes) if each in {*example.present, *np.unique(predicted)}]
                classes, grid = tuple(classes[row] for row in kept), grid[kept]
            image = measurement.reader.image(example.index)
            found[number] = Shown(example, image, predicted, classes, grid, float(accuracy[number]), reason, plain)
    return [found[number] for number, _ in chosen]


def _labelled(
    grid: Float[np.ndarray, "classes rows columns"],
    *,
    classes: Sequence[int],
    wordless: bool,
    example: Example,
    threshold: Threshold | None,
    masks: MaskOptions,
) -> Int[np.ndarray, "height width"]:
    """Returns the class of every pixel, as `zero_shot.count` finds it.

    Args:
      classes: the class of each row of scores.
      wordless: whether the last row has no words, and wins where all others are below the threshold.
    """
    if threshold == MEAN:
        return _object_above_mean(grid[0], example, masks)
    if wordless:
        grid[-1] = threshold
    labels = upsampled_labels(grid, example.labels.shape, masks=masks, pixels=example.pixels)
    return np.array(classes, np.int32)[labels]


def _object_above_mean(
    grid: Float[np.ndarray, "rows columns"], example: Example, masks: MaskOptions
) -> Int[np.ndarray, "height width"]:
    """Returns what is foreground by the mean of the object's map, as `zero_shot.count` finds it."""
    size = np.array(example.labels.shape)
    edges = edges_of(jnp.asarray(example.pixels), (grid.shape[0], grid.shape[1]), masks)
    scores, _ = best_classes(jnp.asarray(grid)[None], jnp.asarray(size), canvas=example.labels.shape, edges=edges)
    return np.where(above_mean(scores, jnp.asarray(size)), FOREGROUND, BACKGROUND).astype(np.int32)


def shown_segments(measurement: Measurement, outcome: Counts, best: Setting, count: int) -> list[ShownSegments]:
    """Returns the images that `pictured` chooses by accuracy after the match, at the first seed, as segments."""
    settings, counting = measurement.settings, measurement.unsupervised
    look, block = Look(best.step, settings.seeds[0]), settings.plain_readouts.index(best.readout)
    thresholds: list[Any] = [protocol.threshold for protocol in settings.unsupervised]
    place = thresholds.index(best.threshold)
    accuracy = _percent(outcome.matched.right[counting.looks.index(look), block, place], outcome)
    absent_classes, classes = settings.unsupervised[place].absent_classes, len(measurement.benchmark.classes)
    chosen, found = pictured(accuracy, outcome.histograms, count), dict[int, ShownSegments]()
    for numbers, why, examples in _batches(measurement, outcome, chosen):
        divided = counting.segments(assemble(examples, settings.batch_size), look, block, place)
        for number, reason, example, segments in zip(numbers, why, examples, divided, strict=True):
            image = measurement.reader.image(example.index)
            owners = owners_of(example.labels, segments, classes, absent_classes=absent_classes)
            found[number] = ShownSegments(example, image, segments, owners, float(accuracy[number]), reason)
    return [found[number] for number, _ in chosen]


def owners_of(
    labels: Integer[np.ndarray, "height width"],
    segments: Int[np.ndarray, "height width"],
    classes: int,
    *,
    absent_classes: bool,
) -> Int[np.ndarray, " segments"]:
    """Returns the class that each segment of an image is matched with, `UNMATCHED` for none."""
    (unit,) = tables(labels.reshape(1, -1), segments.reshape(1, -1), classes)
    owners = np.full(unit.shape[1], UNMATCHED)
    _, matched, chosen = matched_pairs(unit, absent_classes=absent_classes)
    there = chosen < len(owners)
    owners[chosen[there]] = matched[there]
    return owners


def _percent(right: Int[np.ndarray, " images"], outcome: Counts) -> Float[np.ndarray, " images"]:
    """Returns the percent of each image's counted pixels that are right; NaN if none is counted."""
    counted = outcome.histograms.sum(axis=1)
    return np.where(counted > 0, 100 * right / np.maximum(counted, 1), np.nan)


def _batches(
    measurement: Measurement, outcome: Counts, chosen: Sequence[tuple[int, Why]]
) -> Iterator[tuple[Sequence[int], Sequence[Why], Sequence[Example]]]:
    """Yields batches of chosen images of one size: places in the counts, why they were chosen, and the examples."""
    known = {int(outcome.indices[number]): (number, why) for number, why in chosen}
    for some in of_one_size(map(measurement.reader.example, known), measurement.settings.batch_size, []):
        numbers, why = zip(*(known[example.index] for example in some), strict=True)
        yield numbers, why, some
