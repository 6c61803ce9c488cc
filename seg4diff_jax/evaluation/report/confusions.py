"""What classes are confused with, read off a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

LEAST = 0.5
"""Percent: smaller shares are not named."""


class Confused(NamedTuple):
    """One class among all. Shares are percent.

    Attributes:
      index: of the class.
      of_all: share of all pixels that are of this class.
      found: share of the class's pixels that are taken for it (recall).
      right: share of what is taken for the class that is of it (precision); None when nothing is.
      taken_for: other classes that get most of its pixels, and their shares of these; the rest is `elsewhere`.
      made_of: other classes of which most pixels that are wrongly taken for it are, and their shares of all that are
        taken for it.
    """

    index: int
    of_all: float
    found: float
    right: float | None
    taken_for: list[tuple[int, float]]
    elsewhere: float
    made_of: list[tuple[int, float]]


def confused(
    confusion: Integer[np.ndarray, "classes classes"], classes: Sequence[int], *, others: int = 4, sources: int = 2
) -> list[Confused]:
    """Each of `classes`, which must occur, in the order given.

    Args:
      confusion: pixels of each class (rows) that are taken for each class.
      others, sources: how many are named of `taken_for` and `made_of`, at most.
    """
    found = []
    for index in classes:
        own, claimed = confusion[index].astype(np.float64), confusion[:, index].astype(np.float64)
        hits, pixels, said = own[index], own.sum(), claimed.sum()
        taken_for = _largest(own, index, others, pixels)
        wrong = 100 * (pixels - hits) / pixels
        found.append(
            Confused(
                index,
                of_all=100 * pixels / confusion.sum(),
                found=100 * hits / pixels,
                right=100 * hits / said if said else None,
                taken_for=taken_for,
                elsewhere=max(0.0, wrong - sum(share for _, share in taken_for)),
                made_of=_largest(claimed, index, sources, said),
            )
        )
    return found


def _largest(pixels: np.ndarray, itself: int, count: int, total: float) -> list[tuple[int, float]]:
    order = [int(index) for index in np.argsort(-pixels, kind="stable") if index != itself]
    shares = [(index, 100 * float(pixels[index]) / total) for index in order[:count]] if total else []
    return [(index, share) for index, share in shares if share >= LEAST]
