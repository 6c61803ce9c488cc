"""Scores segments without names, after matching them one to one to the true classes by the pixels that they share.

A unit is what is matched by itself: an image or, as in the release, a row of pixels. The device counts one small matrix
for each unit. SciPy matches on the host, so that ties are broken as in SciPy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer
from scipy.optimize import linear_sum_assignment

from seg4diff_jax.segmentation.grouping import Grouping
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.segmentation.unsupervised import MERGE_THRESHOLDS, MinMax

Match = Literal["image", "row"]
"""The unit of matching: an image, or each of its rows of pixels. The release matches rows, which scores higher."""


@dataclass(frozen=True)
class UnsupervisedProtocol:
    """The options by which segments are made and scored.

    Attributes:
      threshold, minmax: options of merging, see `segmentation.unsupervised`.
      match: the unit of matching, see `Match`.
      absent_classes: also match classes that the unit does not have. The pixels of a segment that is matched to such a
        class count as false positives of that class. The pixels of an unmatched segment are no false positives: they
        only count as missed by their true classes.
      grouping: by what segments are made, see `segmentation.grouping`.
    """

    threshold: float
    minmax: MinMax = "pixel"
    match: Match = "image"
    absent_classes: bool = False
    grouping: Grouping = "pads"


UNSUPERVISED_PROTOCOLS = {
    "ours": UnsupervisedProtocol(MERGE_THRESHOLDS["pixel"]),
    "release": UnsupervisedProtocol(0.1, "token", "row", absent_classes=True),
    "release_config": UnsupervisedProtocol(0.035, "token", "row", absent_classes=True),
}
"""The protocols by name: ours, the released code as it runs, and the release with its configuration's threshold."""


@dataclass(frozen=True)
class MatchCounts:
    """Pixels of each class after the match, int64 [classes]: hits, false positives and missed. Counts can be added."""

    hits: Int[np.ndarray, " classes"]
    false: Int[np.ndarray, " classes"]
    missed: Int[np.ndarray, " classes"]

    def __add__(self, other: MatchCounts) -> MatchCounts:
        return MatchCounts(self.hits + other.hits, self.false + other.false, self.missed + other.missed)

    def iou(self) -> Float[np.ndarray, " classes"]:
        """Returns intersection over union of each class, 0..1; NaN for a class that neither truth nor match has."""
        union = self.hits + self.false + self.missed
        return np.divide(self.hits, union, out=np.full(len(union), np.nan), where=union > 0)

    def mean_iou(self) -> float:
        """Returns the mean over the classes that have an IoU, 0..1; NaN if none has."""
        scores = self.iou()
        scores = scores[~np.isnan(scores)]
        return float(scores.mean()) if len(scores) else float("nan")

    def accuracy(self) -> Float[np.ndarray, " classes"]:
        """Returns the share of each class's labelled pixels that are right, 0..1; NaN for a class without any."""
        labelled = self.hits + self.missed
        return np.divide(self.hits, labelled, out=np.full(len(labelled), np.nan), where=labelled > 0)

    def pixel_accuracy(self) -> float:
        """Returns the share of the labelled pixels that are right, 0..1; NaN if none is labelled."""
        labelled = (self.hits + self.missed).sum()
        return float(self.hits.sum() / labelled) if labelled else float("nan")


def no_counts(classes: int) -> MatchCounts:
    """Returns counts of zero for every class."""
    return MatchCounts(*(np.zeros(classes, np.int64) for _ in range(3)))


def intersections(
    truth: Integer[Array, "*pixels"],
    segments: Integer[Array, "*pixels"],
    *,
    classes: int,
    most: int,
    ignored: int = IGNORED,
) -> Int[Array, "classes_and_ignored most"]:
    """Counts the pixels that each class shares with each segment; the last row has those with the void label.

    It works under jit and vmap, over images or over rows of pixels.

    Args:
      segments: segment of each pixel, 0 to `most` - 1. Pixels below 0 are not counted at all.
    """
    truth = jnp.where(truth == ignored, classes, truth.astype(jnp.int32))
    pairs = jnp.where(segments < 0, (classes + 1) * most, truth * most + segments)
    counts = jnp.bincount(pairs.reshape(-1), length=(classes + 1) * most + 1).astype(jnp.int32)
    return counts[:-1].reshape(classes + 1, most)


def matched_counts(
    units: Iterable[Integer[np.ndarray, "classes_and_ignored most"]], *, classes: int, absent_classes: bool
) -> MatchCounts:
    """Matches the segments of each unit to classes, so that they share the most pixels, and counts pixels.

    Each class gets a segment while there are any, even one that it shares no pixel with. Segments without a class are
    false positives of no class.

    Args:
      units: the result of `intersections` for each unit.
    """
    total = no_counts(classes)
    for unit in units:
        if not unit[:-1].any():  # no pixel is labelled, so none can be right or wrong
            continue
        counted, owners, chosen = matched_pairs(unit, absent_classes=absent_classes)
        shared = counted[owners, chosen]
        total.hits[owners] += shared
        total.false[owners] += counted[:, chosen].sum(axis=0) - shared
        total.missed[:] += counted.sum(axis=1)
        total.missed[owners] -= shared
    return total


def matched_pairs(
    unit: Integer[np.ndarray, "classes_and_ignored most"], *, absent_classes: bool
) -> tuple[Int[np.ndarray, "classes segments"], Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """Matches one unit. Returns the pixel counts that it matched by, the matched classes, and the segment of each.

    With `absent_classes`, some classes may get segment numbers past the last segment that occurs.
    """
    if absent_classes:
        counted = released_matrix(unit)
        return counted, *linear_sum_assignment(counted, maximize=True)
    counted = unit[:-1].astype(np.int64)
    return counted, *match_present(counted)


def match_present(
    counted: Int[np.ndarray, "classes most"],
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """Matches the classes that occur with the segments that have a labelled pixel.

    Returns the matched classes, and the segment of each.
    """
    owners, segments = np.flatnonzero(counted.any(axis=1)), np.flatnonzero(counted.any(axis=0))
    rows, columns = linear_sum_assignment(counted[np.ix_(owners, segments)], maximize=True)
    return owners[rows], segments[columns]


def released_matrix(unit: Integer[np.ndarray, "classes_and_ignored most"]) -> Int[np.ndarray, "classes segments"]:
    """Returns the matrix that the release matches: all classes by the segments up to the last that occurs.

    It has at least as many segments as classes. Segments on void pixels alone occur too: their columns of zeros can
    change how SciPy breaks ties.
    """
    occurring = 1 + int(np.flatnonzero(unit.any(axis=0)).max())
    matrix = np.zeros((len(unit) - 1, max(len(unit) - 1, occurring)), np.int64)
    matrix[:, :occurring] = unit[:-1, :occurring]
    return matrix
