"""Unsupervised: from a model's attention under an empty prompt to pixels matched with classes (Seg4Diff, section 3).

Maps are merged, upsampled and counted on the device, segments matched on the host (`segmentation.unsupervised_tally`):

    passes.encode_images -> readouts.attention_maps -> counted_segments -> matched_counts
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seg4diff_jax.evaluation.batches import EvaluationBatch
from seg4diff_jax.evaluation.readouts import Forward, Latents
from seg4diff_jax.evaluation.rows import ONE_SEGMENT
from seg4diff_jax.evaluation.zero_shot import PERMUTED, guess_keys
from seg4diff_jax.segmentation.unsupervised_scores import MatchCounts, UnsupervisedProtocol
from seg4diff_jax.segmentation.unsupervised_tally import Truth, UnsupervisedTally, counted_segments


class Look(NamedTuple):
    """One look at every image: the noise level, counted from the clean end of 28, and the seed of the noise."""

    step: int
    seed: int


class SegmentCounts(NamedTuple):
    """Pixels matched over some images, int64: of each class those right, wrongly claimed and missed (`MatchCounts`).

    The places of `looks`, blocks, `protocols` and seeds are those of an `Unsupervised`.

    Attributes:
      permuted: of the maps of the first noise level with their positions permuted, image by image.
      one_segment: of images that are one segment each.
      segments: how many all images have; `permuted_segments` those of the permuted maps.
      right: how many pixels of each image are right.
    """

    pixels: Int[np.ndarray, "looks blocks protocols 3 classes"]
    segments: Int[np.ndarray, "looks blocks protocols"]
    permuted: Int[np.ndarray, "seeds blocks protocols 3 classes"]
    permuted_segments: Int[np.ndarray, "seeds blocks protocols"]
    one_segment: Int[np.ndarray, "1 1 protocols 3 classes"]
    right: Int[np.ndarray, "looks blocks protocols images"]


class Unsupervised:
    """Scores of segments without names, for several blocks, noise levels and seeds of one model.

    Attributes:
      looks: every noise level with every seed; each is a pass of its own.
      tallies: for every look and `(PERMUTED, seed)` one for each block, and one alone for `ONE_SEGMENT`.

    Args:
      protocols: how segments are made and scored, all from the same passes; without any nothing is counted.
    """

    def __init__(
        self,
        forward: Forward,
        classes: int,
        *,
        steps: Sequence[int],
        seeds: Sequence[int],
        protocols: Sequence[UnsupervisedProtocol],
    ):
        self.forward, self.classes, self.protocols = forward, classes, tuple(protocols)
        self.seeds, self._first_step = tuple(seeds), steps[0]
        self.looks = tuple(Look(step, seed) for seed in seeds for step in steps)
        self._reset()

    def _reset(self) -> None:
        blocks = {
            name: len(self.forward.readouts) for name in (*self.looks, *((PERMUTED, seed) for seed in self.seeds))
        }
        self.tallies: dict[tuple | str, list[UnsupervisedTally]] = {
            name: [UnsupervisedTally(self.protocols, self.classes) for _ in range(count)]
            for name, count in (blocks | {ONE_SEGMENT: 1}).items()
        }

    def add(self, latents: Latents, batch: EvaluationBatch) -> None:
        """Count images. Returns once those before them have been matched, while the device works on these.

        Raises FloatingPointError when attention is not finite: the weights are damaged.
        """
        if not self.protocols:
            return
        pipe, images = self.forward.pipe, len(latents)
        grid, truth = self.forward.grid(latents), Truth(len(batch.examples), batch.truth, batch.sizes)
        with pipe.settings():
            columns = pipe.tokenizers.clip_l.model_max_length
            alike = pipe.spread(jnp.zeros((images, grid[0] * grid[1], columns)))
            self.tallies[ONE_SEGMENT][0].add(alike, grid, truth)
            for one in self.looks:
                maps = self._maps(latents, batch, one)
                self._count(one, maps, grid, truth)
                if one.step == self._first_step:
                    self._count((PERMUTED, one.seed), permuted_tokens(maps, batch.indices, one.seed), grid, truth)

    def _maps(
        self, latents: Latents, batch: EvaluationBatch, one: Look
    ) -> Float[Array, "blocks images tokens columns"]:
        images = len(latents)
        prompts, every = self.forward.encoded([""] * images), np.arange(images, dtype=np.int32)
        return self.forward.maps(latents, batch.indices, prompts, every, **one._asdict())

    def segments(
        self, batch: EvaluationBatch, one: Look, block: int, protocol: int
    ) -> list[Int[np.ndarray, "height width"]]:
        """The segment of every pixel of each image in one look, by places of the block and of the protocol."""
        latents, chosen = self.forward.latents(batch.pixels), self.protocols[protocol]
        with self.forward.pipe.settings():
            maps = self._maps(latents, batch, one)[block]
            options = {"grid": self.forward.grid(latents), "classes": self.classes, "minmax": chosen.minmax}
            thresholds = np.array([chosen.threshold], np.float32)
            labels, _ = counted_segments(maps, batch.truth, batch.sizes, thresholds, **options, match="row")
        sizes = batch.sizes[: len(batch.examples)].tolist()
        return [each[0, :height, :width] for each, (height, width) in zip(np.asarray(labels), sizes, strict=False)]

    def _count(
        self,
        name: tuple,
        maps: Float[Array, "blocks images tokens columns"],
        grid: tuple[int, int],
        truth: Truth,
    ) -> None:
        for tally, attention in zip(self.tallies[name], maps, strict=True):
            tally.add(attention, grid, truth)

    def take(self) -> SegmentCounts:
        """All that has been counted since the last call. Raises as `add` does."""
        for tallies in self.tallies.values():
            for tally in tallies:
                tally.finish()
        permuted = [(PERMUTED, seed) for seed in self.seeds]
        matched = SegmentCounts(
            self._pixels(self.looks),
            self._segments(self.looks),
            self._pixels(permuted),
            self._segments(permuted),
            self._pixels([ONE_SEGMENT]),
            self._right(),
        )
        self._reset()
        return matched

    def _pixels(self, names: Sequence[tuple | str]) -> Int[np.ndarray, "names blocks protocols 3 classes"]:
        found = [[stacked(tally.counts, self.classes) for tally in self.tallies[name]] for name in names]
        return np.array(found, np.int64)

    def _segments(self, names: Sequence[tuple | str]) -> Int[np.ndarray, "names blocks protocols"]:
        return np.array([[tally.segments for tally in self.tallies[name]] for name in names], np.int64)

    def _right(self) -> Int[np.ndarray, "looks blocks protocols images"]:
        tallies = [self.tallies[look] for look in self.looks]
        shape = len(tallies), len(tallies[0]), len(self.protocols), tallies[0][0].images
        return np.array([[tally.right for tally in some] for some in tallies], np.int64).reshape(shape)

    def running_miou(self, before: SegmentCounts | None) -> float | None:
        """Of the best block and protocol in the first look, 0 to 1, over the images matched so far; None for none."""
        pixels = self._pixels(self.looks[:1])[0] + (before.pixels[0] if before else 0)
        scores = [MatchCounts(*each).mean_iou() for of_block in pixels for each in of_block]
        return max((score for score in scores if not np.isnan(score)), default=None)


def stacked(counts: Iterable[MatchCounts], classes: int) -> Int[np.ndarray, "protocols 3 classes"]:
    found = [[one.hits, one.false, one.missed] for one in counts]
    return np.array(found, np.int64).reshape(-1, 3, classes)


@jax.jit
def permuted_tokens(
    maps: Float[Array, "blocks images tokens columns"], indices: Int[Array, " images"], seed: Int[Array, ""]
) -> Float[Array, "blocks images tokens columns"]:
    """Each image's maps with its image tokens in random order, the same for all maps."""
    order = lambda index: jax.random.permutation(guess_keys(index, seed)[0], maps.shape[2])
    return jnp.take_along_axis(maps, jax.vmap(order)(indices)[None, :, :, None], axis=2)
