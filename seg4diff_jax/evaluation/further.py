"""Counts what figures beside mIoU need, on the device, from the class scores that make masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from seg4diff_jax.data.single_objects import FOREGROUND
from seg4diff_jax.evaluation.batches import EvaluationBatch
from seg4diff_jax.evaluation.options import AVERAGE_PRECISION, BOUNDARY, POINTING, PRESENCE, WITH_ABSENT
from seg4diff_jax.parallel import split_batch
from seg4diff_jax.segmentation.average_precision import object_precision
from seg4diff_jax.segmentation.boundaries import band_widths, boundary_counts
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.segmentation.open_vocabulary import best_classes, edges_of, label_map
from seg4diff_jax.segmentation.pointing import pointing_counts
from seg4diff_jax.segmentation.presence import SCORES, presence_scores

OF_MASKS = BOUNDARY, POINTING
"""Metrics that need the truth, pixel by pixel."""


class Pass(NamedTuple):
    """One pass over all images.

    Attributes:
      step: the noise level, counted from the clean end of 28.
      seed: seed of the noise.
      prompts: the classes that prompts name, see `options.PROMPTS`.
    """

    step: int
    seed: int
    prompts: str = "present"


class FurtherCounts(NamedTuple):
    """What was counted over some images. Passes are in the order of a `Further`; none of what is not measured.

    Attributes:
      boundary: pixels of each class in bands along edges, see `segmentation.boundaries.boundary_counts`.
      pointing: images in which each class was pointed at rightly, and tried, see `segmentation.pointing`.
      presence: scores of presence of each class in each image, see `segmentation.presence`; NaN where it was not asked.
      average_precision: of each image's object, see `segmentation.average_precision`.
    """

    boundary: Int[np.ndarray, "passes readouts 3 classes"]
    pointing: Int[np.ndarray, "passes readouts 2 classes"]
    presence: Float[np.ndarray, "asking readouts scores classes images"]
    average_precision: Float[np.ndarray, "passes readouts images"]


class Further:
    """Counts figures beside mIoU for all passes over a set.

    Attributes:
      passes: all passes and guessers, in order.
      asking: the passes whose prompts name classes that an image does not have: those that presence is measured in.

    Args:
      guesses: names of guessers whose masks are scored as those of passes are.
      readouts, classes: their numbers.
      metrics: which of `options.METRICS` are measured. With none nothing is computed.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        guesses: Sequence[tuple],
        readouts: int,
        classes: int,
        metrics: Sequence[str] = (),
    ):
        self.readouts, self.classes = readouts, classes
        self.passes: tuple[tuple, ...] = (*passes, *guesses)
        self.asking = tuple(one for one in passes if PRESENCE in metrics and one.prompts in WITH_ABSENT)
        self.of_masks = tuple(name for name in OF_MASKS if name in metrics)
        self.of_objects = self.passes if AVERAGE_PRECISION in metrics else ()
        self._reset()

    def _reset(self) -> None:
        self._masks: dict[tuple, list[dict[str, Array]]] = {one: [] for one in self.passes}
        self._presence: dict[tuple, list[tuple[Int[np.ndarray, "images rows"], Array]]]
        self._presence = {one: [] for one in self.asking}
        self._precision: dict[tuple, list[tuple[int, Array]]] = {one: [] for one in self.of_objects}

    def count(
        self,
        one: tuple,
        parts: Sequence[tuple[Float[Array, "_ images classes tokens"], MaskOptions]],
        grid: tuple[int, int],
        batch: EvaluationBatch,
    ) -> None:
        """Counts a batch in one pass. Returns at once: the device may still be working.

        Args:
          parts: class scores on the grid of image tokens, rows as in `batch.class_of_row`, and whether masks follow the
            image's edges: see `Forward.by_edges`.
        """
        if one in self._presence:
            own, scores = batch.class_of_row[: len(batch.examples)], jnp.concatenate([scores for scores, _ in parts])
            self._presence[one].append((own, image_scores(scores, batch.class_of_row)))
        if one in self._precision:
            asked = batch.truth, batch.sizes
            found = [
                precision_of_objects(
                    scores, *asked, batch.pixels if masks.follow_edges else None, grid=grid, masks=masks
                )
                for scores, masks in parts
            ]
            self._precision[one].append((len(batch.examples), jnp.concatenate(found)))
        if self.of_masks:
            options = {"grid": grid, "classes": self.classes, "metrics": self.of_masks}
            asked = batch.truth, batch.sizes, band_widths(batch.sizes), batch.class_of_row
            counted = [
                mask_counts(scores, *asked, batch.pixels if masks.follow_edges else None, **options, masks=masks)
                for scores, masks in parts
            ]
            self._masks[one].append({name: jnp.concatenate([each[name] for each in counted]) for name in self.of_masks})

    def take(self) -> FurtherCounts:
        """Returns what was counted since the last call. Waits for the device."""
        none = np.zeros((self.readouts, len(SCORES), self.classes, 0), np.float32)
        pieces = [
            np.concatenate([none, *(self._by_class(*each) for each in some)], axis=-1)
            for some in self._presence.values()
        ]
        presence = np.stack(pieces) if pieces else none[None][:0]
        counted = FurtherCounts(self._total(BOUNDARY, 3), self._total(POINTING, 2), presence, self._precision_taken())
        self._reset()
        return counted

    def _precision_taken(self) -> Float[np.ndarray, "passes readouts images"]:
        none = np.zeros((self.readouts, 0))
        pieces = [
            np.concatenate([none, *(np.asarray(found)[:, :images] for images, found in some)], axis=1)
            for some in self._precision.values()
        ]
        return np.stack(pieces) if pieces else none[None][:0]

    def _total(self, metric: str, numbers: int) -> Int[np.ndarray, "passes readouts numbers classes"]:
        """Adds up what was counted of masks, in 64 bits; no passes if it was not measured."""
        passes = self.passes if metric in self.of_masks else ()
        total = np.zeros((len(passes), self.readouts, numbers, self.classes), np.int64)
        for place, one in enumerate(passes):
            for counted in self._masks[one]:
                total[place] += np.asarray(counted[metric])
        return total

    def _by_class(
        self, class_of_row: Int[np.ndarray, "images rows"], found: Float[Array, "readouts batch scores rows"]
    ) -> Float[np.ndarray, "readouts scores classes images"]:
        """Puts scores of rows at the places of their classes."""
        placed = np.full((self.readouts, len(class_of_row), len(SCORES), self.classes), np.nan, np.float32)
        image, row = np.nonzero(class_of_row != IGNORED)
        placed[:, image, :, class_of_row[image, row]] = np.asarray(found)[:, image, :, row]
        return np.moveaxis(placed, 1, -1)


# ---- compiled programs ----------------------------------------------------------------------------------------------


@jax.jit
def image_scores(
    scores: Float[Array, "readouts images classes tokens"], class_of_row: Int[Array, "images classes"]
) -> Float[Array, "readouts images scores classes"]:
    """Returns `presence_scores` of each image; `class_of_row` is `IGNORED` for classes that are not asked for."""
    of_images = jax.vmap(presence_scores)
    return split_batch(jax.lax.map(lambda one: of_images(split_batch(one), class_of_row != IGNORED), scores), 1)


@partial(jax.jit, static_argnames=("grid", "classes", "metrics", "masks"))
def mask_counts(
    scores: Float[Array, "readouts images rows tokens"],
    truth: UInt8[Array, "images height width"],
    sizes: Int[Array, "images 2"],
    widths: Int[Array, " images"],
    class_of_row: Int[Array, "images rows"],
    pixels: Float[Array, "images seen_rows seen_columns 3"] | np.ndarray | None = None,
    *,
    grid: tuple[int, int],
    classes: int,
    metrics: tuple[str, ...],
    masks: MaskOptions = PAPERS_MASKS,
) -> dict[str, Int[Array, "readouts numbers classes"]]:
    """Counts a batch for each metric of masks: `boundary_counts` and `pointing_counts`, added up over images.

    Args:
      truth: labels at the images' own sizes on a canvas, with `IGNORED` around them; images without a label count
        nothing.
      widths: of the bands along edges.
      pixels: of the images as the model sees them, values of -1..1, whose edges masks follow if `masks` says so.
    """
    canvas = (truth.shape[1], truth.shape[2])
    truth, sizes, widths, class_of_row = (split_batch(array) for array in (truth, sizes, widths, class_of_row))
    pixels = None if pixels is None else split_batch(jnp.asarray(pixels))

    def bands(rows: Array, truth: Array, size: Array, width: Array, labels: Array, pixels: Array | None) -> Array:
        edges = None if pixels is None else edges_of(pixels, grid, masks)
        found = labels[label_map(rows, size, canvas=canvas, present=labels != IGNORED, edges=edges)]
        return boundary_counts(truth, found, size, width, classes)

    def points(rows: Array, truth: Array, size: Array, width: Array, labels: Array, pixels: Array | None) -> Array:
        return pointing_counts(rows, truth, size, labels, classes)

    def of_readout(scores: Array) -> dict[str, Array]:
        rows = split_batch(scores).reshape(*scores.shape[:2], *grid)
        counting = {BOUNDARY: bands, POINTING: points}
        each = {name: jax.vmap(counting[name])(rows, truth, sizes, widths, class_of_row, pixels) for name in metrics}
        return {name: counts.sum(axis=0) for name, counts in each.items()}

    return jax.lax.map(of_readout, scores)


@partial(jax.jit, static_argnames=("grid", "masks"))
def precision_of_objects(
    scores: Float[Array, "readouts images rows tokens"],
    truth: UInt8[Array, "images height width"],
    sizes: Int[Array, "images 2"],
    pixels: Float[Array, "images seen_rows seen_columns 3"] | np.ndarray | None = None,
    *,
    grid: tuple[int, int],
    masks: MaskOptions = PAPERS_MASKS,
) -> Float[Array, "readouts images"]:
    """Returns `object_precision` of each image, whose first row of scores is that of its object.

    Args:
      truth, sizes, pixels, masks: as for `mask_counts`; labels are foreground or background.
    """
    canvas = (truth.shape[1], truth.shape[2])
    truth, sizes = split_batch(truth), split_batch(sizes)
    pixels = None if pixels is None else split_batch(jnp.asarray(pixels))

    def of_image(row: Array, truth: Array, size: Array, pixels: Array | None) -> Array:
        edges = None if pixels is None else edges_of(pixels, grid, masks)
        upsampled, _ = best_classes(row[None], size, canvas=canvas, edges=edges)
        return object_precision(upsampled, truth, size, FOREGROUND)

    def of_readout(scores: Array) -> Array:
        rows = split_batch(scores[:, 0]).reshape(len(scores), *grid)
        return jax.vmap(of_image)(rows, truth, sizes, pixels)

    return jax.lax.map(of_readout, scores)
