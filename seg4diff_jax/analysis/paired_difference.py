"""The difference of two measurements of the same things, with an interval by bootstrap over groups of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtr, stdtrit

RESAMPLES = 10_000
COVERAGE = 95
"""Percent of the resampled differences that lie in the interval."""
AT_ONCE = 2**22
"""Most draws that are in memory at once."""


class PairedDifference(NamedTuple):
    """A mean of differences, and the ends of its interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_difference(
    first: Float[np.ndarray, " pairs"],
    second: Float[np.ndarray, " pairs"],
    groups: Int[np.ndarray, " pairs"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Returns the mean of second minus first, with its 95 % bootstrap interval over groups.

    The interval is the expanded percentile interval (Hesterberg, 2015): a percentile interval of few groups is too
    narrow, since draws from them vary less than they do, and has not the groups' own heavier tails. Its percentiles are
    moved outwards by what Student's interval of so many groups is wider. Of very few it still is too narrow.

    Groups are drawn, not pairs, because the pairs of a group are not independent: pictures of one prompt, for example.
    All pairs of a drawn group count, so the mean is one over pairs even where groups have different sizes.

    Args:
      groups: the number of the group of each pair.
      seed: of the draws.

    Raises ValueError for fewer than two groups, whose spread nobody can tell, and for numbers that are not finite.
    """
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    if not np.isfinite(differences).all():
        raise ValueError("a difference is not finite: expected numbers")
    _, group = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(group, weights=differences), np.bincount(group)
    if len(sums) < 2:
        raise ValueError(f"an interval over groups needs at least two of them, found {len(sums)}")
    draw, means = np.random.default_rng(seed), np.empty(resamples)
    rows = max(1, AT_ONCE // len(sums))
    for start in range(0, resamples, rows):
        drawn = draw.integers(0, len(sums), (min(rows, resamples - start), len(sums)))
        means[start : start + rows] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(means, 100 * expanded_tail(len(sums)) * np.array([1, -1]) + [0, 100])
    return PairedDifference(float(differences.mean()), float(low), float(high))


def expanded_tail(groups: int) -> float:
    """Returns the part of the resampled means that lies below an interval, and above it, 0 to 0.5."""
    within = (1 + COVERAGE / 100) / 2
    return float(ndtr(-np.sqrt(groups / (groups - 1)) * stdtrit(groups - 1, within)))
