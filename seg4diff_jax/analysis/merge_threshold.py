"""Unsupervised scores of many thresholds, and of other protocols, in one pass over labelled images.

The attention of each image is computed once, and the divergences of its maps once for each normalisation; each
threshold then merges, upsamples and counts on the device. The host matches the segments of one batch while the device
works on the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from seg4diff_jax.data.loader import Item, Source
from seg4diff_jax.images import Resize
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.segmentation.open_vocabulary import CANVAS
from seg4diff_jax.segmentation.unsupervised import MinMax, divergences, log_distributions, merge, segment_labels
from seg4diff_jax.segmentation.unsupervised_scores import (
    Match,
    MatchCounts,
    UnsupervisedProtocol,
    intersections,
    matched_counts,
    no_counts,
)

THRESHOLDS = tuple(float(f"{0.001 * 2 ** (step / 2):.2g}") for step in range(17))
"""0.001 to 0.26, each about 1.4 times the one before."""
READERS = 4
"""Threads that decode images: Pillow lets others run meanwhile."""


Way = tuple[MinMax, Match]


@dataclass(frozen=True)
class UnsupervisedScore:
    """What came out of one protocol: pixels counted over all images, and how many segments an image has on average."""

    protocol: UnsupervisedProtocol
    counts: MatchCounts
    segments: float


class LabelledBatch(NamedTuple):
    """Images with their labels on one canvas, `IGNORED` around them; the last repeated to fill up, past `count`."""

    count: int
    indices: list[int]
    pixels: Float[np.ndarray, "images rows columns 3"]
    truth: UInt8[np.ndarray, "images height width"]
    sizes: Int[np.ndarray, "images 2"]


def unsupervised_scores(
    pipe: Pipeline,
    source: Source,
    classes: int,
    protocols: Sequence[UnsupervisedProtocol],
    *,
    block: int | None = None,
    step: int | None = None,
    seed: int = 0,
    resize: Resize = "square",
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda images: None,
) -> list[UnsupervisedScore]:
    """The scores of a set under each protocol, from one forward pass on each image.

    Args:
      source: items with `image` and `labels` 0 to `classes` - 1, or 255; as `data.folder.LabelledFolder` has them.
      protocols: those that match rows keep a matrix of classes by tokens for each row of each image of a batch.
      block, step, seed: as for `Pipeline.segment`; an image's noise is made of the seed and its number in the set.
      resize: how images come to the trained square: "square" or "release".
      progress: told how many images are done.

    Raises:
      ImageError, FolderError: an image or its labels are not usable.
      ValueError: there are no images or no protocols, or an option is not usable.
      FloatingPointError: attention is not finite: damaged weights.
    """
    if not len(source) or not protocols:
        raise ValueError(f"{len(source)} images and {len(protocols)} protocols: expected at least one of each")
    size = pipe.view.size((0, 0), None, resize)
    grid = size[0] // pipe.view.multiple, size[1] // pipe.view.multiple
    tally, done = UnsupervisedTally(protocols, classes), 0
    for batch in labelled_batches(pipe, source, size, resize, batch_size):
        noise = pipe.view.noise(None, batch.indices, len(source), size, seed)
        attention = pipe.empty_prompt_attention(batch.pixels, noise, block=block, step=step)
        with pipe.settings():
            tally.add(attention, grid, batch)
        done += batch.count
        progress(done)
    return tally.scores()


class UnsupervisedTally:
    """Pixels counted under each protocol.

    Protocols that differ in nothing but thresholds and absent classes share all that they can.
    """

    def __init__(self, protocols: Sequence[UnsupervisedProtocol], classes: int):
        self.protocols, self.classes, self.images = protocols, classes, 0
        self._totals = [no_counts(classes) for _ in protocols]
        self._segments = np.zeros(len(protocols), np.int64)
        self._places: dict[Way, list[int]] = {}
        for place, protocol in enumerate(protocols):
            self._places.setdefault((protocol.minmax, protocol.match), []).append(place)
        self._pending: list[tuple[Way, int, Array, Array]] = []

    def add(self, attention: Float[Array, "images image tokens"], grid: tuple[int, int], batch: LabelledBatch) -> None:
        """Count a batch. Returns once the batch before it has been matched, while the device still counts this one.

        Raises FloatingPointError when attention is not finite.
        """
        before, self._pending, images = self._pending, [], (attention, batch.truth, batch.sizes)
        for way, places in self._places.items():
            thresholds = jnp.array([self.protocols[place].threshold for place in places], jnp.float32)
            counted = segment_intersections(images, thresholds, grid, self.classes, *way)
            self._pending.append((way, batch.count, *counted))
        self._match(before)
        self.images += batch.count

    def scores(self) -> list[UnsupervisedScore]:
        before, self._pending = self._pending, []
        self._match(before)
        means = self._segments / max(self.images, 1)
        return [UnsupervisedScore(*each) for each in zip(self.protocols, self._totals, means.tolist(), strict=True)]

    def _match(self, counted: list[tuple[Way, int, Array, Array]]) -> None:
        for way, images, units, segments in counted:
            found, numbers = np.asarray(units)[:images], np.asarray(segments)[:images]
            if (numbers < 0).any():
                raise FloatingPointError("attention is not finite: the weights are damaged")
            for number, place in enumerate(self._places[way]):
                own, absent = found[:, number].reshape(-1, *found.shape[-2:]), self.protocols[place].absent_classes
                self._totals[place] += matched_counts(own, classes=self.classes, absent_classes=absent)
                self._segments[place] += numbers[:, number].sum()


def at_thresholds(protocol: UnsupervisedProtocol, thresholds: Sequence[float]) -> list[UnsupervisedProtocol]:
    return [replace(protocol, threshold=threshold) for threshold in thresholds]


def best_score(scores: Sequence[UnsupervisedScore]) -> UnsupervisedScore:
    """The first of the highest mean IoU."""
    return max(scores, key=lambda score: np.nan_to_num(score.counts.mean_iou(), nan=-1.0))


@partial(jax.jit, static_argnames=("grid", "classes", "minmax", "match"))
def segment_intersections(
    images: tuple[Float[Array, "images image tokens"], UInt8[Array, "images height width"], Int[Array, "images 2"]],
    thresholds: Float[Array, " thresholds"],
    grid: tuple[int, int],
    classes: int,
    minmax: MinMax,
    match: Match,
) -> tuple[Int[Array, "images thresholds units classes_and_ignored tokens"], Int[Array, "images thresholds"]]:
    """Pixels that classes share with segments, see `intersections`, and the number of segments: -1 if not finite.

    Args:
      images: attention under an empty prompt, labels on a canvas and their own sizes.
    """

    def of_image(image: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        attention, truth, size = image
        log_probs = log_distributions(attention, minmax)
        probs, apart = jnp.exp(log_probs), divergences(log_probs)
        canvas = truth.shape[0], truth.shape[1]
        inside = (jnp.arange(canvas[0]) < size[0])[:, None] & (jnp.arange(canvas[1]) < size[1])
        count = partial(intersections, classes=classes, most=len(probs))

        def at(threshold: Array) -> tuple[Array, Array]:
            segments = merge(probs, apart, threshold)
            labels = jnp.where(inside, segment_labels(segments, grid, size, canvas=canvas), -1)
            units = jax.vmap(count)(truth, labels) if match == "row" else count(truth, labels)[None]
            return units, jnp.where(jnp.isfinite(attention).all(), segments.count, -1)

        return jax.lax.map(at, thresholds)

    return jax.lax.map(of_image, images)


# ---- on the host ----------------------------------------------------------------------------------------------------


def labelled_batches(
    pipe: Pipeline, source: Source, size: tuple[int, int], how: Resize, batch_size: int
) -> Iterator[LabelledBatch]:
    """The images of a set in order, as they are seen at `size`; the next batch is read ahead."""

    def read(index: int) -> tuple[Item, np.ndarray]:
        item = source[index]
        return item, pipe.view.pixels([item["image"]], size, how)[0]

    with ThreadPoolExecutor(READERS) as pool:
        coming = pool.map(read, range(min(batch_size, len(source))))
        for start in range(0, len(source), batch_size):
            some = list(coming)
            following = start + batch_size
            coming = pool.map(read, range(following, min(following + batch_size, len(source))))
            filled = some + some[-1:] * (batch_size - len(some))
            labels = [item["labels"] for item, _ in filled]
            height, width = (-(-max(each.shape[axis] for each in labels) // CANVAS) * CANVAS for axis in (0, 1))
            truth = np.full((batch_size, height, width), IGNORED, np.uint8)
            for place, each in enumerate(labels):
                truth[place, : each.shape[0], : each.shape[1]] = each
            indices = [min(index, len(source) - 1) for index in range(start, following)]
            pixels, sizes = np.stack([seen for _, seen in filled]), np.array([each.shape for each in labels], np.int32)
            yield LabelledBatch(len(some), indices, pixels, truth, sizes)
