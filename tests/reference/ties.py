"""Labels of two runs that round differently: equal wherever rounding cannot decide, and what it can decide is rare.

Two runs are ours and PyTorch's, a batch and an image by itself, many devices and one, or one processor and another.
Where the best class leads the second by less than the two may be apart, a label may be either; those pixels are left
out, and no others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment

SCORES = 1e-5
"""By how much the scores of two runs in fp32 may differ, over the largest of them."""
FEW = 5e-3
"""The share of pixels that rounding may decide about, unless a test says why it is another."""


def upsampling_error(grid: tuple[int, int]) -> float:
    """What bilinear interpolation in fp32 may be off by, over the largest score.

    A pixel's position on the grid takes three roundings, each of at most the grid's side x 2^-24; the weights are
    positions less whole numbers, so they are off by as much, along both axes; products and sums add a few 2^-24.
    """
    return (3 * sum(grid) + 4) * 2**-24


def undecided(scores: np.ndarray, size: tuple[int, int], *, error: float = SCORES) -> np.ndarray:
    """Pixels that may get one label in one run and another in the other, bool [height, width].

    Args:
      scores: [classes, rows, columns] of either run; they are upsampled in float64.
      error: by how much those of the other may differ, over the largest. 0: both upsample the same numbers.
    """
    if len(scores) == 1:
        return np.zeros(size, bool)
    exact = torch.from_numpy(np.asarray(scores, np.float64))[None]
    best, second = F.interpolate(exact, size, mode="bilinear")[0].topk(2, dim=0).values.numpy()
    return best - second <= 2 * (error + upsampling_error(scores.shape[1:])) * np.abs(scores).max()


def ignore(label_file: Path, where: np.ndarray, *, few: float = FEW, ignored: int = 255) -> None:
    """Leave pixels [height, width] out of a label file, so that what is counted of the rest is the same in any run."""
    labels = np.asarray(Image.open(label_file)).copy()
    before = set(np.unique(labels))
    labels[where] = ignored
    assert before <= {*np.unique(labels), ignored}, f"{label_file}: a class is left with no pixel"
    assert where.mean() <= few, f"{label_file}: {where.mean():.4f} of the pixels are left out"
    Image.fromarray(labels).save(label_file)


def assert_same_labels(
    ours: np.ndarray, theirs: np.ndarray, scores: np.ndarray, *, error: float = SCORES, few: float = FEW
) -> None:
    """Equal labels [height, width] wherever rounding cannot decide; it can about a share of `few` pixels at most."""
    left_out = undecided(scores, theirs.shape, error=error)
    np.testing.assert_array_equal(ours[~left_out], theirs[~left_out])
    assert left_out.mean() <= few, f"{left_out.mean():.4f} of the pixels are left out"


def assert_one_best(costs: np.ndarray) -> None:
    """No other matching of costs [rows, columns] is so near the best that rounding chooses between them."""
    costs = np.asarray(costs, np.float64)
    rows, columns = linear_sum_assignment(costs)
    best, barred = costs[rows, columns].sum(), np.abs(costs).sum() + 1
    for pair in zip(rows, columns, strict=True):
        others = costs.copy()
        others[pair] = barred
        second = others[linear_sum_assignment(others)].sum()
        assert second - best > 1e-5 * np.abs(costs).max(), f"without the pair {pair} it costs as much"
