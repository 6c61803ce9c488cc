"""Counts what figures beside mIoU need, on the device, from the class scores that make masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from seg4diff_jax.evaluation.batches import EvaluationBatch
from seg4diff_jax.evaluation.options import PRESENCE, WITH_ABSENT
from seg4diff_jax.parallel import split_batch
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.segmentation.presence import SCORES, presence_scores


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
      presence: scores of presence of each class in each image, see `segmentation.presence`; NaN where it was not asked.
    """

    presence: Float[np.ndarray, "asking readouts scores classes images"]


class Further:
    """Counts figures beside mIoU for all passes over a set.

    Attributes:
      asking: the passes whose prompts name classes that an image does not have: those that presence is measured in.

    Args:
      readouts, classes: their numbers.
      metrics: which of `options.METRICS` are measured. With none nothing is computed.
    """

    def __init__(self, passes: Sequence[Pass], readouts: int, classes: int, metrics: Sequence[str] = ()):
        self.readouts, self.classes = readouts, classes
        self.asking = tuple(one for one in passes if PRESENCE in metrics and one.prompts in WITH_ABSENT)
        self._reset()

    def _reset(self) -> None:
        self._presence: dict[Pass, list[tuple[Int[np.ndarray, "images rows"], Array]]]
        self._presence = {one: [] for one in self.asking}

    def count(self, one: Pass, scores: Float[Array, "readouts images classes tokens"], batch: EvaluationBatch) -> None:
        """Counts a batch in one pass. Returns at once: the device may still be working.

        Args:
          scores: class scores on the grid of image tokens, rows as in `batch.class_of_row`.
        """
        if one in self._presence:
            own = batch.class_of_row[: len(batch.examples)]
            self._presence[one].append((own, image_scores(scores, batch.class_of_row)))

    def take(self) -> FurtherCounts:
        """Returns what was counted since the last call. Waits for the device."""
        none = np.zeros((self.readouts, len(SCORES), self.classes, 0), np.float32)
        pieces = [
            np.concatenate([none, *(self._by_class(*each) for each in some)], axis=-1)
            for some in self._presence.values()
        ]
        counted = FurtherCounts(np.stack(pieces) if pieces else none[None][:0])
        self._reset()
        return counted

    def _by_class(
        self, class_of_row: Int[np.ndarray, "images rows"], found: Float[Array, "readouts batch scores rows"]
    ) -> Float[np.ndarray, "readouts scores classes images"]:
        """Puts scores of rows at the places of their classes."""
        placed = np.full((self.readouts, len(class_of_row), len(SCORES), self.classes), np.nan, np.float32)
        image, row = np.nonzero(class_of_row != IGNORED)
        placed[:, image, :, class_of_row[image, row]] = np.asarray(found)[:, image, :, row]
        return np.moveaxis(placed, 1, -1)


@jax.jit
def image_scores(
    scores: Float[Array, "readouts images classes tokens"], class_of_row: Int[Array, "images classes"]
) -> Float[Array, "readouts images scores classes"]:
    """Returns `presence_scores` of each image; `class_of_row` is `IGNORED` for classes that are not asked for."""
    of_images = jax.vmap(presence_scores)
    return split_batch(jax.lax.map(lambda one: of_images(split_batch(one), class_of_row != IGNORED), scores), 1)
