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

from seg4diff_jax.evaluation.background import above_mean, at_thresholds, part_of, right_pixels
from seg4diff_jax.evaluation.batches import EvaluationBatch
from seg4diff_jax.evaluation.further import Further, Pass
from seg4diff_jax.evaluation.options import MEAN, Threshold
from seg4diff_jax.evaluation.readouts import Forward, Latents
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.parallel import split_batch
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions
from seg4diff_jax.segmentation.metrics import IGNORED, confusion_matrices, mean_iou
from seg4diff_jax.segmentation.open_vocabulary import best_classes, class_scores, combine_prompts, edges_of

MOST_COUNTED = 2**31 - 1
"""Largest number of pixels that a confusion matrix of 32-bit integers can count."""
PERMUTED, RANDOM = "permuted", "random"


class ConfusionCounts(NamedTuple):
    """Pixel counts over some images, int64. The axes `passes` and `guesses` are in the order of a `ZeroShot`.

    A reading is a readout at a threshold of the background; see `measurement.Settings.readings`.

    Attributes:
      confusion: confusion matrices of all passes and readings.
      permuted: confusion matrices for the maps of the first noise level, with positions permuted in each image.
      random: confusion matrices for random scores instead of those of the first readout, without a threshold.
      right: number of right pixels in each image.
    """

    confusion: Int[np.ndarray, "passes readings classes classes"]
    permuted: Int[np.ndarray, "guesses readings classes classes"]
    random: Int[np.ndarray, "guesses 1 classes classes"]
    right: Int[np.ndarray, "passes readings images"]


class Thresholds(NamedTuple):
    """Scores below which a pixel is background, ascending, or `mean`; and which class that is. Default: none."""

    scores: tuple[Threshold, ...] = ()
    background: int = -1

    @property
    def parts(self) -> int:
        """Into how many parts they divide pixels."""
        return len(self.scores) + 1

    @property
    def readings(self) -> int:
        """How many ways to read a readout they make."""
        return max(1, len(self.scores))

    @property
    def by_mean(self) -> bool:
        """Whether each map has a threshold of its own, its mean: see `background.above_mean`."""
        return self.scores == (MEAN,)


NO_THRESHOLDS = Thresholds()


class Tally:
    """Confusion matrices of several readings, counted on the device and added up on the host in 64 bits if needed."""

    def __init__(self, readouts: int, classes: int, thresholds: Thresholds = NO_THRESHOLDS):
        self._thresholds = thresholds
        self._shape = (readouts, thresholds.parts, classes, classes)
        self._device: list[Array] = []
        self._host = np.zeros(self._shape, np.int64)
        self._pixels = 0

    def count(
        self,
        parts: Sequence[tuple[Float[Array, "_ images classes tokens"], MaskOptions]],
        grid: tuple[int, int],
        batch: EvaluationBatch,
    ) -> Int[Array, "readings images"]:
        """Counts a batch. Returns the number of right pixels in each image.

        Args:
          parts: scores, readouts first, and whether they follow the image's edges: see `Forward.by_edges`.
        """
        if self._pixels + batch.truth.size > MOST_COUNTED:
            self.total()
        self._pixels += batch.truth.size
        former = self._device or [jnp.zeros((len(scores), *self._shape[1:]), jnp.int32) for scores, _ in parts]
        by_mean = self._thresholds.by_mean
        scores = np.zeros(1) if by_mean else self._thresholds.scores
        below = np.array(scores, np.float32), np.int32(self._thresholds.background)
        asked = batch.truth, batch.sizes, batch.class_of_row, *below
        counted = [
            count(
                before,
                scores,
                *asked,
                batch.pixels if masks.follow_edges else None,
                grid=grid,
                masks=masks,
                by_mean=by_mean,
            )
            for before, (scores, masks) in zip(former, parts, strict=True)
        ]
        self._device = [confusion for confusion, _ in counted]
        return jnp.concatenate([right for _, right in counted])

    def total(self) -> Int[np.ndarray, "readings classes classes"]:
        if self._device:
            self._host += np.concatenate([np.asarray(confusion) for confusion in self._device])
            self._device, self._pixels = [], 0
        each = at_thresholds(self._host, self._thresholds.background) if self._thresholds.scores else self._host
        return each.reshape(-1, *self._shape[2:])


class ZeroShot:
    """Confusion matrices of a set of images, for several blocks, heads, noise levels and seeds of one model.

    Attributes:
      passes: every noise level with every seed, for each kind of prompts.
      guesses: kind of prompts and seed of each baseline that ignores the image (permuted and random scores).
      tallies: a tally for every pass, every `(PERMUTED, *guess)` and every `(RANDOM, *guess)`, see `ConfusionCounts`.
      further: counts of figures beside mIoU.

    Args:
      prompts: kinds of prompts; `add` takes one batch for each. With none nothing is counted.
      thresholds: of the background; each readout is read at each of them.
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
        thresholds: Thresholds = NO_THRESHOLDS,
        metrics: Sequence[str] = (),
    ):
        self.forward, self.classes, self.prompts, self.thresholds = forward, classes, tuple(prompts), thresholds
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
        self.tallies: dict[tuple, Tally] = {name: Tally(readouts, self.classes, self.thresholds) for name in names}
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
            parts = self.forward.by_edges(scores)
            right = self.tallies[one].count(parts, grid, batch)
            self._pending.append((one, len(batch.examples), right))
            self.further.count(one, parts, grid, batch)
            if one.step == self._first_step:
                permuted, random = without_images(scores, batch.indices, one.seed)
                smooth = [(permuted, PAPERS_MASKS)]
                self.tallies[PERMUTED, one.prompts, one.seed].count(smooth, grid, batch)
                self.further.count((PERMUTED, one.prompts, one.seed), smooth, grid, batch)
                self.tallies[RANDOM, one.prompts, one.seed].count([(random, PAPERS_MASKS)], grid, batch.guessed())

    def take(self) -> ConfusionCounts:
        """Returns the counts since the last call."""
        self._keep(self._pending)
        self._pending = []
        none = np.zeros((len(self.forward.readouts) * self.thresholds.readings, 0), np.int64)
        pieces = [np.concatenate([none, *some], axis=1) for some in self._right.values()]
        counted = ConfusionCounts(
            self._total(self.passes, len(none)),
            self._total([(PERMUTED, *guess) for guess in self.guesses], len(none)),
            self._total([(RANDOM, *guess) for guess in self.guesses], 1),
            np.stack(pieces) if pieces else none[None][:0],
        )
        self._reset()
        return counted

    def _total(self, names: Sequence[tuple], readings: int) -> Int[np.ndarray, "names readings classes classes"]:
        none = np.zeros((0, readings, self.classes, self.classes), np.int64)
        return np.concatenate([none, *(self.tallies[name].total()[None] for name in names)])

    def running_miou(self, before: ConfusionCounts | None) -> float | None:
        """Returns the mIoU, 0 to 1, of the best reading in the first pass so far; None if nothing is counted.

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
        refined = sum(readout.refined for readout in forward.readouts)
        shape = len(latents), batch.class_of_row.shape[1], rows * columns
        scores = jnp.zeros((len(forward.readouts) - refined, *shape), jnp.float32)
        for asked, texts in zip(batch.prompts, conditioning, strict=True) if len(scores) else ():
            maps = forward.maps(latents, batch.indices, texts, asked.image_of_row, step=one.step, seed=one.seed)
            averaging, image_of_row = forward.pipe.spread((asked.averaging, asked.image_of_row))
            with forward.pipe.settings():
                scores = add_scores(scores, maps, averaging, image_of_row)
        if not refined:
            return scores
        read = partial(forward.refined_scores, latents, batch.indices, step=one.step, seed=one.seed)
        each = list(zip(batch.prompts, conditioning, strict=True))
        if forward.masks.reading != "prompt":
            each = [((rows := batch.as_concepts()), forward.encoded(rows.texts))]
        better = jnp.zeros((refined, *shape), jnp.float32)
        for asked, texts in each:
            better = better + read(texts, asked)
        return jnp.concatenate([scores, better])


# ---- compiled programs ----------------------------------------------------------------------------------------------


@partial(jax.jit, donate_argnames=("scores",))
def add_scores(
    scores: Float[Array, "readouts images classes tokens"],
    maps: Float[Array, "readouts rows tokens columns"],
    averaging: Float[Array, "rows classes columns"],
    image_of_row: Int[Array, " rows"],
) -> Float[Array, "readouts images classes tokens"]:
    """Adds the class scores of some prompts to those of the others."""
    images = scores.shape[1]
    some = jax.lax.map(lambda one: combine_prompts(class_scores(one, averaging), image_of_row, images), maps)
    return split_batch(scores + some, 1)


@partial(jax.jit, donate_argnames=("confusion",), static_argnames=("grid", "masks", "by_mean"))
def count(
    confusion: Int[Array, "readouts parts classes classes"],
    scores: Float[Array, "readouts images rows tokens"],
    truth: UInt8[Array, "images height width"],
    sizes: Int[Array, "images 2"],
    class_of_row: Int[Array, "images rows"],
    thresholds: Float[Array, " thresholds"],
    background: Int[Array, ""],
    pixels: Float[Array, "images seen_rows seen_columns 3"] | np.ndarray | None = None,
    *,
    grid: tuple[int, int],
    masks: MaskOptions = PAPERS_MASKS,
    by_mean: bool = False,
) -> tuple[Int[Array, "readouts parts classes classes"], Int[Array, "readings images"]]:
    """Upsamples scores to each image's own size on the canvas, takes the best class of each pixel and counts.

    Args:
      confusion: confusion matrices of the parts into which thresholds divide pixels, one more than thresholds.
      class_of_row: for each image the class of each row of scores, `IGNORED` for unused rows; several rows may be of
        one class.
      thresholds, background: the pixels of an image that is asked for `background` are that class where all scores are
        below a threshold.
      pixels: of the images as the model sees them, values of -1..1, whose edges scores follow if `masks` says so.
      by_mean: a pixel is background where no other class is above the mean of its map, whatever the one value of
        `thresholds`. Rows of the background, such as competitors', then win no pixel themselves.

    Returns:
      the confusion matrices with this batch added, and the number of right pixels in each image at each threshold; -1
      if a score of the image is not finite.
    """
    canvas, classes, parts = (truth.shape[1], truth.shape[2]), confusion.shape[-1], len(thresholds) + 1
    truth, sizes, class_of_row = (split_batch(array) for array in (truth, sizes, class_of_row))
    pixels = None if pixels is None else split_batch(jnp.asarray(pixels))

    def predicted(scores: Array, size: Array, asked: Array, pixels: Array | None) -> tuple[Array, Array]:
        rows, edges = scores.reshape(-1, *grid), None if pixels is None else edges_of(pixels, grid, masks)
        present = (asked != IGNORED) & ((asked != background) | (not by_mean))
        best, labels = best_classes(rows, size, canvas=canvas, present=present, edges=edges)
        if by_mean:
            return asked[labels], above_mean(best, size).astype(jnp.int32)
        return asked[labels], part_of(best, thresholds, (asked == background).any())

    def of_readout(before_and_scores: tuple[Array, Array]) -> tuple[Array, Array]:
        before, scores = before_and_scores
        found = jax.vmap(predicted)(split_batch(scores), sizes, class_of_row, pixels)
        labels, part = (split_batch(array) for array in found)
        right = jax.vmap(partial(right_pixels, background=background, parts=parts))(labels, truth, part)
        finite = jnp.isfinite(scores).all(axis=(1, 2))
        matrices = confusion_matrices(truth, labels, part, classes, IGNORED, parts=parts)
        return before + matrices, jnp.where(finite, right.T, -1)

    confusion, right = jax.lax.map(of_readout, (confusion, scores))
    return confusion, right.reshape(-1, right.shape[-1])


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
