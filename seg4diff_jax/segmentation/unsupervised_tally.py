"""Scores the segments of many images under several protocols at once.

The device upsamples segments and counts. The host matches the segments of one batch while the device works on the next.
To match images, the host gets a small table of each image. To match rows, it gets label maps, which are smaller than
tables of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int16, Integer, UInt8

from seg4diff_jax.segmentation.grouping import Grouping, ImageVectors, segments_of_images
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.segmentation.unsupervised import MinMax, Segments, segment_labels
from seg4diff_jax.segmentation.unsupervised_scores import (
    Match,
    MatchCounts,
    UnsupervisedProtocol,
    intersections,
    matched_counts,
    no_counts,
)

Making = tuple[Grouping, MinMax]
"""How segments are made, but for the threshold."""
Way = tuple[Making, Match]


@dataclass(frozen=True)
class UnsupervisedScore:
    """The result of one protocol: pixels counted over all images, and the mean number of segments of an image."""

    protocol: UnsupervisedProtocol
    counts: MatchCounts
    segments: float


class Truth(NamedTuple):
    """The true labels of a batch, on canvases of one size.

    Attributes:
      count: number of images; further ones only fill up the batch.
      labels: labels of each image, with `IGNORED` around them.
      sizes: height and width of each image's labels.
    """

    count: int
    labels: UInt8[np.ndarray, "images height width"]
    sizes: Int[np.ndarray, "images 2"]


class UnsupervisedTally:
    """Counts pixels under each protocol, batch by batch.

    Attributes:
      counts: pixel counts of each protocol, over all images that have been matched.
      segments: number of segments in all these images, for each protocol.
      right: for each protocol, the number of pixels of each image that are right after its match.
      images: number of images that have been matched.
    """

    def __init__(self, protocols: Sequence[UnsupervisedProtocol], classes: int):
        self.protocols, self.classes, self.images = tuple(protocols), classes, 0
        self.counts = [no_counts(classes) for _ in protocols]
        self.segments = np.zeros(len(protocols), np.int64)
        self.right: list[list[int]] = [[] for _ in protocols]
        self._places: dict[Way, list[int]] = {}
        self._thresholds: dict[Way, list[int]] = {}
        for making, places in made_alike(protocols).items():
            for threshold, place in enumerate(places):
                way = making, protocols[place].match
                self._places.setdefault(way, []).append(place)
                self._thresholds.setdefault(way, []).append(threshold)
        self._pending: list[tuple[Way, Truth, Array, Array]] = []

    def add(self, segments: Mapping[Making, Segments], grid: tuple[int, int], truth: Truth) -> None:
        """Counts a batch. Returns when the batch before has been matched, while the device still counts this one.

        Args:
          segments: of each image, for each way to make them that a protocol has, at its thresholds: what
            `made_segments` returns. Their maps may be split over devices.
          grid: rows and columns of image tokens.

        Raises FloatingPointError if maps of the batch before are not finite; `finish` reports the last batch.
        """
        before, self._pending = self._pending, []
        for way in self._places:
            some = jax.tree.map(lambda leaf, way=way: leaf[:, self._thresholds[way]], segments[way[0]])
            options = {"grid": grid, "classes": self.classes, "match": way[1]}
            self._pending.append((way, truth, *counted_segments(some, truth.labels, truth.sizes, **options)))
        self._match(before)

    def finish(self) -> None:
        """Matches the last batch, if it has not been matched yet. Raises FloatingPointError as `add` does."""
        before, self._pending = self._pending, []
        self._match(before)

    def scores(self) -> list[UnsupervisedScore]:
        """Finishes, and returns the result of each protocol."""
        self.finish()
        means = self.segments / max(self.images, 1)
        return [UnsupervisedScore(*each) for each in zip(self.protocols, self.counts, means.tolist(), strict=True)]

    def _match(self, counted: list[tuple[Way, Truth, Array, Array]]) -> None:
        for way, truth, counts, segments in counted:
            found, numbers = np.asarray(counts)[: truth.count], np.asarray(segments)[: truth.count]
            if (numbers < 0).any():
                raise FloatingPointError("attention is not finite: the weights are damaged")
            for number, place in enumerate(self._places[way]):
                absent = self.protocols[place].absent_classes
                own = found[:, number]
                tables = row_tables(truth, own, self.classes) if way[1] == "row" else own[:, None]
                for units in tables:
                    counts = matched_counts(units, classes=self.classes, absent_classes=absent)
                    self.counts[place] += counts
                    self.right[place].append(int(counts.hits.sum()))
                self.segments[place] += numbers[:, number].sum()
        self.images += counted[0][1].count if counted else 0


def row_tables(
    truth: Truth, segments: Int16[np.ndarray, "images height width"], classes: int
) -> Iterator[Iterator[Integer[np.ndarray, "classes_and_ignored most"]]]:
    """Yields, for each image, the tables of its rows of pixels."""
    for labels, found, (height, width) in zip(truth.labels, segments, truth.sizes.tolist(), strict=False):
        yield tables(labels[:height, :width], found[:height, :width], classes)


def tables(
    truth: Integer[np.ndarray, "units pixels"], segments: Integer[np.ndarray, "units pixels"], classes: int
) -> Iterator[Integer[np.ndarray, "classes_and_ignored most"]]:
    """Yields, for each unit, what `intersections` counts, computed on the host."""
    true, own = truth.astype(np.int64), segments.astype(np.int64)
    most = int(own.max()) + 1
    for unit in np.where(true == IGNORED, classes, true) * most + own:
        yield np.bincount(unit, minlength=(classes + 1) * most).reshape(classes + 1, most)


def made_alike(protocols: Sequence[UnsupervisedProtocol]) -> dict[Making, list[int]]:
    """Returns the places of the protocols whose segments are made in one way, at thresholds of their own."""
    places: dict[Making, list[int]] = {}
    for place, protocol in enumerate(protocols):
        places.setdefault((protocol.grouping, protocol.minmax), []).append(place)
    return places


def made_segments(
    seen: Mapping[Grouping, Float[Array, "images image tokens"] | ImageVectors],
    protocols: Sequence[UnsupervisedProtocol],
    grid: tuple[int, int],
) -> dict[Making, Segments]:
    """Returns the segments of each image, for each way to make them, at the thresholds of its protocols in order.

    Args:
      seen: what one pass shows of the images, for each grouping (`segments_of_images`).
    """
    return {
        (grouping, minmax): segments_of_images(
            seen[grouping],
            [protocols[place].threshold for place in places],
            grouping=grouping,
            minmax=minmax,
            grid=grid,
        )
        for (grouping, minmax), places in made_alike(protocols).items()
    }


@partial(jax.jit, static_argnames=("grid", "classes", "match"))
def counted_segments(
    segments: Segments,
    truth: UInt8[Array, "images height width"],
    sizes: Int[Array, "images 2"],
    *,
    grid: tuple[int, int],
    classes: int,
    match: Match,
) -> tuple[Integer[Array, "images thresholds classes_or_height rows_or_width"], Int[Array, "images thresholds"]]:
    """Returns what the host needs for matching, and the number of segments: -1 if their maps are not finite.

    To match images, the host needs the pixels that classes share with segments (see `intersections`). To match rows,
    it needs each image's label map on the canvas, int16.

    Args:
      segments: of each image at each threshold: maps [images, thresholds, rows, tokens].
    """

    def of_image(segments: Segments, truth: Array, size: Array) -> tuple[Array, Array]:
        canvas = truth.shape[0], truth.shape[1]
        inside = (jnp.arange(canvas[0]) < size[0])[:, None] & (jnp.arange(canvas[1]) < size[1])

        def at(segments: Segments) -> tuple[Array, Array]:
            count = jnp.where(jnp.isfinite(segments.maps).all(), segments.count, -1)
            labels = segment_labels(segments, grid, size, canvas=canvas)
            if match == "row":
                return labels.astype(jnp.int16), count
            most = len(segments.maps)
            return intersections(truth, jnp.where(inside, labels, -1), classes=classes, most=most), count

        return jax.lax.map(at, segments)

    return jax.vmap(of_image)(segments, truth, sizes)
