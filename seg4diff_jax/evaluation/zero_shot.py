"""The open-vocabulary protocol: confusion matrices from a model's attention (Seg4Diff, section 3).

Class scores are upsampled, compared and counted on the device:

    passes.encode_images -> readouts.attention_maps -> add_scores -> count
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from seg4diff_jax.evaluation.batches import EvaluationBatch
from seg4diff_jax.evaluation.further import Further, Pass
from seg4diff_jax.evaluation.readouts import Forward, Latents
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.parallel import split_batch
from seg4diff_jax.segmentation.metrics import IGNORED, confusion_matrix, mean_iou
from seg4diff_jax.segmentation.open_vocabulary import class_scores, combine_prompts, label_map

MOST_COUNTED = 2**31 - 1
"""Largest number of pixels that a confusion matrix of 32-bit integers can count."""
PERMUTED, RANDOM = "permuted", "random"


class ConfusionCounts(NamedTuple):
    """Pixel counts over some images, int64. The axes `passes` and `guesses` are in the order of a `ZeroShot`.

    Attributes:
      confusion: confusion matrices of all passes and readouts.
      permuted: confusion matrices for the maps of the first noise level, with positions permuted in each image.
      random: confusion matrices for random scores instead of those of the first readout.
      right: number of right pixels in each image.
    """

    confusion: Int[np.ndarray, "passes readouts classes classes"]
    permuted: Int[np.ndarray, "guesses readouts classes classes"]
    random: Int[np.ndarray, "guesses 1 classes classes"]
    right: Int[np.ndarray, "passes readouts images"]


class Tally:
    """Confusion matrices of several readouts, counted on the device and added up on the host in 64 bits if needed."""

    def __init__(self, readouts: int, classes: int):
        self._shape = (readouts, classes, classes)
        self._device: Array | None = None
        self._host = np.zeros(self._shape, np.int64)
        self._pixels = 0

    def count(
        self, scores: Float[Array, "readouts images classes tokens"], grid: tuple[int, int], batch: EvaluationBatch
    ) -> Int[Array, "readouts images"]:
        """Counts a batch. Returns the number of right pixels in each image."""
        if self._pixels + batch.truth.size > MOST_COUNTED:
            self.total()
        self._pixels += batch.truth.size
        former = jnp.zeros(self._shape, jnp.int32) if self._device is None else self._device
        self._device, right = count(former, scores, batch.truth, batch.sizes, batch.class_of_row, grid=grid)
        return right

    def total(self) -> Int[np.ndarray, "readouts classes classes"]:
        if self._device is not None:
            self._host += np.asarray(self._device)
            self._device, self._pixels = None, 0
        return self._host


class ZeroShot:
    """Confusion matrices of a set of images, for several blocks, heads, noise levels and seeds of one model.

    Attributes:
      passes: every noise level with every seed, for each kind of prompts.
      guesses: kind of prompts and seed of each baseline that ignores the image (permuted and random scores).
      tallies: a tally for every pass, every `(PERMUTED, *guess)` and every `(RANDOM, *guess)`, see `ConfusionCounts`.
      further: counts of figures beside mIoU.

    Args:
      prompts: kinds of prompts; `add` takes one batch for each. With none nothing is counted.
      metrics: figures beside mIoU, see `options.METRICS`.
    """

    def __init__(
        self,
        forward: Forward,
        classes: int,
        *,
        steps: Sequence[int],
        seeds: Sequence[int],
        prompts: Sequence[str] = ("present",),
        metrics: Sequence[str] = (),
    ):
        self.forward, self.classes, self.prompts = forward, classes, tuple(prompts)
        self.passes = tuple(Pass(step, seed, kind) for kind in prompts for seed in seeds for step in steps)
        self.guesses = tuple((kind, seed) for kind in prompts for seed in seeds)
        guessers = [(PERMUTED, *guess) for guess in self.guesses]
        self.further = Further(self.passes, guessers, len(forward.readouts), classes, metrics)
        self._first_step = steps[0]
        self._pending: list[tuple[Pass, int, Array]] = []
        self._reset()

    def _reset(self) -> None:
        readouts = len(self.forward.readouts)
        names = [*self.passes, *((PERMUTED, *guess) for guess in self.guesses)]
        self.tallies: dict[tuple, Tally] = {name: Tally(readouts, self.classes) for name in names}
        self.tallies |= {(RANDOM, *guess): Tally(1, self.classes) for guess in self.guesses}
        self._right: dict[Pass, list[np.ndarray]] = {one: [] for one in self.passes}

    def add(self, latents: Latents, *batches: EvaluationBatch) -> None:
        """Counts the same images with each kind of prompts.

        Returns when the images of the call before are counted, so the host prepares images while the device works.

        Raises:
          FloatingPointError: scores are not finite, so the weights are damaged.
        """
        before, self._pending = self._pending, []
        for kind, batch in zip(self.prompts, batches, strict=True):
            conditioning = [self.forward.encoded(rows.texts) for rows in batch.prompts]
            for one in self.passes:
                if one.prompts == kind:
                    self._count(batch, latents, conditioning, one)
        self._keep(before)

    def _count(self, batch: EvaluationBatch, latents: Latents, conditioning: list[TextConditioning], one: Pass) -> None:
        scores = self._scores(batch, latents, conditioning, one)
        grid = self.forward.grid(latents)
        with self.forward.pipe.settings():
            right = self.tallies[one].count(scores, grid, batch)
            self._pending.append((one, len(batch.examples), right))
            self.further.count(one, scores, grid, batch)
            if one.step == self._first_step:
                permuted, random = without_images(scores, batch.indices, one.seed)
                self.tallies[PERMUTED, one.prompts, one.seed].count(permuted, grid, batch)
                self.further.count((PERMUTED, one.prompts, one.seed), permuted, grid, batch)
                self.tallies[RANDOM, one.prompts, one.seed].count(random, grid, batch)

    def take(self) -> ConfusionCounts:
        """Returns the counts since the last call."""
        self._keep(self._pending)
        self._pending = []
        none = np.zeros((len(self.forward.readouts), 0), np.int64)
        pieces = [np.concatenate([none, *some], axis=1) for some in self._right.values()]
        counted = ConfusionCounts(
            self._total(self.passes, len(none)),
            self._total([(PERMUTED, *guess) for guess in self.guesses], len(none)),
            self._total([(RANDOM, *guess) for guess in self.guesses], 1),
            np.stack(pieces) if pieces else none[None][:0],
        )
        self._reset()
        return counted

    def _total(self, names: Sequence[tuple], readouts: int) -> Int[np.ndarray, "names readouts classes classes"]:
        none = np.zeros((0, readouts, self.classes, self.classes), np.int64)
        return np.concatenate([none, *(self.tallies[name].total()[None] for name in names)])

    def running_miou(self, before: ConfusionCounts | None) -> float | None:
        """Returns the mIoU, 0 to 1, of the best readout in the first pass so far; None if nothing is counted.

        Waits for the device.

        Args:
          before: counts of earlier calls to `take`, which are included.
        """
        confusions = self.tallies[self.passes[0]].total() + (before.confusion[0] if before else 0)
        scores = [mean_iou(confusion) for confusion in confusions]
        return max((score for score in scores if not np.isnan(score)), default=None)

    def scores(self, batch: EvaluationBatch, one: Pass) -> Float[np.ndarray, "readouts images classes rows columns"]:
        """Returns class scores of a batch in one pass, on the grid of image tokens; rows as in `batch.class_of_row`."""
        latents = self.forward.latents(batch.pixels)
        conditioning = [self.forward.encoded(rows.texts) for rows in batch.prompts]
        scores = self._scores(batch, latents, conditioning, one)
        return np.asarray(scores).reshape(*scores.shape[:3], *self.forward.grid(latents))

    def _keep(self, counted: list[tuple[Pass, int, Array]]) -> None:
        for one, images, right in counted:
            numbers = np.asarray(right)[:, :images]
            if (numbers < 0).any():
                raise FloatingPointError(f"scores at step {one.step} are not finite: the weights are damaged")
            self._right[one].append(numbers.astype(np.int64))

    def _scores(
        self, batch: EvaluationBatch, latents: Latents, conditioning: list[TextConditioning], one: Pass
    ) -> Float[Array, "readouts images classes tokens"]:
        forward, (rows, columns) = self.forward, self.forward.grid(latents)
        shape = len(forward.readouts), len(latents), batch.class_of_row.shape[1], rows * columns
        scores = jnp.zeros(shape, jnp.float32)
        for asked, texts in zip(batch.prompts, conditioning, strict=True):
            maps = forward.maps(latents, batch.indices, texts, asked.image_of_row, step=one.step, seed=one.seed)
            averaging, image_of_row = forward.pipe.spread((asked.averaging, asked.image_of_row))
            with forward.pipe.settings():
                scores = add_scores(scores, maps, averaging, image_of_row)
        return scores


# ---- compiled programs ----------------------------------------------------------------------------------------------


@partial(jax.jit, donate_argnames=("scores",))
def add_scores(
    scores: Float[Array, "readouts images classes tokens"],
    maps: Float[Array, "readouts rows tokens columns"],
    averaging: Float[Array, "rows classes columns"],
    image_of_row: Int[Array, " rows"],
) -> Float[Array, "readouts images classes tokens"]:
    """Adds the class scores of some prompts to those of the others. Each class is named by one prompt."""
    images = scores.shape[1]
    some = jax.lax.map(lambda one: combine_prompts(class_scores(one, averaging), image_of_row, images), maps)
    return split_batch(scores + some, 1)


@partial(jax.jit, donate_argnames=("confusion",), static_argnames=("grid",))
def count(
    confusion: Int[Array, "readouts classes classes"],
    scores: Float[Array, "readouts images rows tokens"],
    truth: UInt8[Array, "images height width"],
    sizes: Int[Array, "images 2"],
    class_of_row: Int[Array, "images rows"],
    *,
    grid: tuple[int, int],
) -> tuple[Int[Array, "readouts classes classes"], Int[Array, "readouts images"]]:
    """Upsamples scores to each image's own size on the canvas, takes the best class of each pixel and counts.

    Returns:
      the confusion matrices with this batch added, and the number of right pixels in each image; -1 if a score of the
      image is not finite.
    """
    canvas = (truth.shape[1], truth.shape[2])
    truth, sizes, class_of_row = (split_batch(array) for array in (truth, sizes, class_of_row))

    def predicted(scores: Array, size: Array, classes: Array) -> Array:
        rows = scores.reshape(-1, *grid)
        return classes[label_map(rows, size, canvas=canvas, present=classes != IGNORED)]

    def of_readout(before_and_scores: tuple[Array, Array]) -> tuple[Array, Array]:
        before, scores = before_and_scores
        labels = split_batch(jax.vmap(predicted)(split_batch(scores), sizes, class_of_row))
        right = jnp.sum((labels == truth) & (truth != IGNORED), axis=(1, 2))
        finite = jnp.isfinite(scores).all(axis=(1, 2))
        return before + confusion_matrix(truth, labels, before.shape[0], IGNORED), jnp.where(finite, right, -1)

    return jax.lax.map(of_readout, (confusion, scores))


@jax.jit
def without_images(
    scores: Float[Array, "readouts images classes tokens"], indices: Int[Array, " images"], seed: Int[Array, ""]
) -> tuple[Float[Array, "readouts images classes tokens"], Float[Array, "1 images classes tokens"]]:
    """Returns two baselines that do not know where things are: each image's scores, permuted, and random scores."""

    def of_image(index: Array) -> tuple[Array, Array]:
        order, values = guess_keys(index, seed)
        return jax.random.permutation(order, scores.shape[-1]), jax.random.uniform(values, (1, *scores.shape[2:]))

    orders, random = jax.vmap(of_image, out_axes=(0, 1))(indices)
    return jnp.take_along_axis(scores, orders[None, :, None], axis=-1), random


def guess_keys(index: Int[Array, ""], seed: Int[Array, ""]) -> Key[Array, " 2"]:
    """Returns two random keys of an image: one for the permutation of its tokens, one for random scores."""
    # Two folds make these keys independent of the key of the image's noise.
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), 1))
