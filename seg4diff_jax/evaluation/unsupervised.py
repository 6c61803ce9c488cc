"""The unsupervised protocol: segments made with an empty prompt, matched with classes (Seg4Diff, section 3).

Segments are upsampled and counted on the device, and matched on the host (`segmentation.unsupervised_tally`):

    passes.encode_images -> Forward.maps or .vectors -> made_segments -> counted_segments -> matched_counts
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seg4diff_jax.evaluation.batches import EvaluationBatch
from seg4diff_jax.evaluation.readouts import Forward, Latents
from seg4diff_jax.evaluation.rows import ONE_SEGMENT
from seg4diff_jax.evaluation.zero_shot import PERMUTED, guess_keys
from seg4diff_jax.segmentation.grouping import Grouping
from seg4diff_jax.segmentation.unsupervised import Segments
from seg4diff_jax.segmentation.unsupervised_scores import MatchCounts, UnsupervisedProtocol
from seg4diff_jax.segmentation.unsupervised_tally import (
    Making,
    Truth,
    UnsupervisedTally,
    counted_segments,
    made_alike,
    made_segments,
)


class Look(NamedTuple):
    """One pass over all images: the noise level, counted from the clean end of 28, and the seed of the noise."""

    step: int
    seed: int


class SegmentCounts(NamedTuple):
    """Pixel counts of matched segments, int64: right, wrongly claimed and missed pixels of each class (`MatchCounts`).

    The axes `looks`, blocks, `protocols` and seeds are in the order of an `Unsupervised`.

    Attributes:
      pixels: the counts over all images.
      segments: number of segments in all images.
      permuted: counts for the maps of the first noise level, with positions permuted separately in each image.
      permuted_segments: number of segments of these permuted maps.
      one_segment: counts if each image is one segment.
      right: number of right pixels in each image.
    """

    pixels: Int[np.ndarray, "looks blocks protocols 3 classes"]
    segments: Int[np.ndarray, "looks blocks protocols"]
    permuted: Int[np.ndarray, "seeds blocks protocols 3 classes"]
    permuted_segments: Int[np.ndarray, "seeds blocks protocols"]
    one_segment: Int[np.ndarray, "1 1 protocols 3 classes"]
    right: Int[np.ndarray, "looks blocks protocols images"]


class Unsupervised:
    """Counts pixels of segments without names, for several blocks, noise levels and seeds of one model.

    Attributes:
      looks: every noise level with every seed; each is a pass of its own.
      tallies: one tally per block for every look and every `(PERMUTED, seed)`, and a single one for `ONE_SEGMENT`.

    Args:
      protocols: ways to make and score segments, all from the same passes; with none nothing is counted.
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
        """Counts a batch of images.

        Returns when the images of the call before are matched; the device may still be working on this batch.

        Raises:
          FloatingPointError: attention is not finite, so the weights are damaged.
        """
        if not self.protocols:
            return
        pipe, images = self.forward.pipe, len(latents)
        grid, truth = self.forward.grid(latents), Truth(len(batch.examples), batch.truth, batch.sizes)
        with pipe.settings():
            self.tallies[ONE_SEGMENT][0].add(self._alike(images, grid), grid, truth)
            for one in self.looks:
                for at, seen in enumerate(self._seen(latents, batch, one)):
                    made = made_segments(seen, self.protocols, grid)
                    self.tallies[one][at].add(made, grid, truth)
                    if one.step == self._first_step:
                        permuted = {
                            making: Segments(permuted_tokens(each.maps, batch.indices, one.seed), each.count)
                            for making, each in made.items()
                        }
                        self.tallies[PERMUTED, one.seed][at].add(permuted, grid, truth)

    def _alike(self, images: int, grid: tuple[int, int]) -> dict[Making, Segments]:
        """Returns one segment for each image at each threshold."""
        return {
            making: Segments(
                self.forward.pipe.spread(jnp.ones((images, len(places), 1, grid[0] * grid[1]))),
                self.forward.pipe.spread(jnp.ones((images, len(places)), jnp.int32)),
            )
            for making, places in made_alike(self.protocols).items()
        }

    def _seen(self, latents: Latents, batch: EvaluationBatch, one: Look) -> list[dict[Grouping, Any]]:
        """Returns what each readout shows of the images, for every grouping of the protocols."""
        found: list[dict[Grouping, Any]] = [{} for _ in self.forward.readouts]
        if any(protocol.grouping == "pads" for protocol in self.protocols):
            found = [{"pads": maps} for maps in self._maps(latents, batch, one)]
        if by_vectors := {protocol.grouping for protocol in self.protocols} - {"pads"}:
            prompts = self.forward.encoded([""] * len(latents))
            each = self.forward.vectors(latents, batch.indices, prompts, **one._asdict())
            for seen, own in zip(found, each, strict=True):
                seen |= dict.fromkeys(by_vectors, own)
        return found

    def _maps(
        self, latents: Latents, batch: EvaluationBatch, one: Look
    ) -> Float[Array, "blocks images tokens columns"]:
        images = len(latents)
        prompts, every = self.forward.encoded([""] * images), np.arange(images, dtype=np.int32)
        return self.forward.maps(latents, batch.indices, prompts, every, **one._asdict())

    def segments(
        self, batch: EvaluationBatch, one: Look, block: int, protocol: int
    ) -> list[Int[np.ndarray, "height width"]]:
        """Returns the segment of every pixel of each image in one look.

        Args:
          block, protocol: places of the block and of the protocol in their lists.
        """
        latents, chosen = self.forward.latents(batch.pixels), self.protocols[protocol]
        with self.forward.pipe.settings():
            grid, seen = self.forward.grid(latents), self._seen(latents, batch, one)[block]
            (made,) = made_segments(seen, [chosen], grid).values()
            options = {"grid": grid, "classes": self.classes, "match": "row"}
            labels, _ = counted_segments(made, batch.truth, batch.sizes, **options)
        sizes = batch.sizes[: len(batch.examples)].tolist()
        return [each[0, :height, :width] for each, (height, width) in zip(np.asarray(labels), sizes, strict=False)]

    def take(self) -> SegmentCounts:
        """Returns the counts since the last call. Raises as `add` does."""
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
        """Returns the mIoU, 0 to 1, of the best block and protocol in the first look, over the images matched so far.

        None if no image is matched yet.

        Args:
          before: counts of earlier calls to `take`, which are included.
        """
        pixels = self._pixels(self.looks[:1])[0] + (before.pixels[0] if before else 0)
        scores = [MatchCounts(*each).mean_iou() for of_block in pixels for each in of_block]
        return max((score for score in scores if not np.isnan(score)), default=None)


def stacked(counts: Iterable[MatchCounts], classes: int) -> Int[np.ndarray, "protocols 3 classes"]:
    found = [[one.hits, one.false, one.missed] for one in counts]
    return np.array(found, np.int64).reshape(-1, 3, classes)


@jax.jit
def permuted_tokens(
    maps: Float[Array, "images thresholds rows tokens"], indices: Int[Array, " images"], seed: Int[Array, ""]
) -> Float[Array, "images thresholds rows tokens"]:
    """Permutes the image tokens of each image's maps at random, with the same order for all maps of the image."""
    order = lambda index: jax.random.permutation(guess_keys(index, seed)[0], maps.shape[-1])
    return jnp.take_along_axis(maps, jax.vmap(order)(indices)[:, None, None], axis=-1)
