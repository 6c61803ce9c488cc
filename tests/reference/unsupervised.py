"""Unsupervised segmentation and its scores in plain loops: NumPy and SciPy in double precision, PyTorch to upsample."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax

from tests.reference import unsupervised as reference

IGNORED = 255


def minmax_maps(attention: np.ndarray, minmax: str) -> np.ndarray:
    """[image, tokens] to [tokens, image]."""
    maps = np.zeros(attention.T.shape)
    for place in range(attention.shape[1] if minmax == "pixel" else attention.shape[0]):
        values = attention[:, place] if minmax == "pixel" else attention[place]
        scaled = (values - values.min()) / (np.ptp(values) + 1e-6)
        if minmax == "pixel":
            maps[place] = scaled
        else:
            maps[:, place] = scaled
    return maps


def symmetric_kl(x: np.ndarray, y: np.ndarray) -> float:
    quotient = np.log(x) - np.log(y)
    return float((x * quotient).sum() - (y * quotient).sum()) / 2


def distributions(attention: np.ndarray, minmax: str) -> list[np.ndarray]:
    """[image, tokens] to one distribution over the image for each token."""
    return [softmax(one) for one in minmax_maps(attention.astype(np.float64), minmax)]


def divergences(probs: list[np.ndarray]) -> list[float]:
    """Of every two distributions, each once."""
    return [symmetric_kl(x, y) for place, x in enumerate(probs) for y in probs[:place]]


def threshold_near(wanted: float, *images: list[np.ndarray]) -> float:
    """The threshold nearest to `wanted` that no divergence of an image's distributions comes near.

    What rounds differently then merges the same maps.
    """
    found = np.sort(np.concatenate([divergences(probs) for probs in images]))
    low, high = found[:-1], found[1:]
    middles = (low + high)[high - low > 2 * CLEAR * high] / 2
    return float(middles[np.abs(middles - wanted).argmin()])


def assert_clear(threshold: float, *images: list[np.ndarray]) -> None:
    """No divergence of an image's distributions is so near the threshold that rounding decides whether maps merge."""
    apart = np.abs(np.concatenate([divergences(probs) for probs in images]) / threshold - 1)
    assert apart.min() > CLEAR, f"{threshold} is within {apart.min():.1e} of a divergence: take another"


CLEAR = 3e-5
"""What a divergence may be off by when it decides about merging, over itself."""


def merged(attention: np.ndarray, threshold: float, minmax: str) -> np.ndarray:
    """[segments, image]."""
    probs = distributions(attention, minmax)
    claimed: set[int] = set()
    segments = []
    for first in range(len(probs)):
        if first in claimed:
            continue
        group = [other for other in range(len(probs)) if symmetric_kl(probs[first], probs[other]) < threshold]
        claimed |= {first, *group}
        segments.append(np.mean([probs[member] for member in group], axis=0))
    return np.array(segments)


def labels_of(segments: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    maps = torch.from_numpy(segments.reshape(-1, *grid).astype(np.float32))
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0).numpy()


@dataclass
class Counts:
    hits: np.ndarray
    false: np.ndarray
    missed: np.ndarray


def matched_segments(truth: np.ndarray, segments: np.ndarray, classes: int, absent_classes: bool) -> dict[int, int]:
    """Of one unit's pixels, in a row: the segment that each class is matched with; some of it in the truth."""
    labelled = truth != IGNORED
    if absent_classes:
        rows, columns = list(range(classes)), list(range(max(classes, segments.max() + 1)))
    else:
        rows, columns = sorted(set(truth[labelled].tolist())), sorted(set(segments[labelled].tolist()))
    shared = np.array([[((truth == c) & (segments == s)).sum() for s in columns] for c in rows])
    pairs = linear_sum_assignment(shared, maximize=True)
    return {rows[r]: columns[s] for r, s in zip(*pairs, strict=True)}


def count_matches(truth: np.ndarray, segments: np.ndarray, classes: int, match: str, absent_classes: bool) -> Counts:
    """Of one image, pixel by pixel."""
    counts = Counts(*(np.zeros(classes, int) for _ in range(3)))
    units = list(zip(truth, segments, strict=True)) if match == "row" else [(truth.ravel(), segments.ravel())]
    for true, guess in units:
        labelled = true != IGNORED
        if not labelled.any():
            continue
        segment_of = matched_segments(true, guess, classes, absent_classes)
        for c in range(classes):
            own = segment_of.get(c, -1)
            for t, s in zip(true[labelled], guess[labelled], strict=True):
                counts.hits[c] += t == c and s == own
                counts.false[c] += t != c and s == own
                counts.missed[c] += t == c and s != own
    return counts


def thresholds_between(attention: np.ndarray, minmax: str, count: int = 4) -> list[float]:
    """Some that no divergence comes near, so that rounding decides nothing."""
    found = sorted({0.0, *reference.divergences(reference.distributions(attention, minmax))})
    gaps = [((low + high) / 2, high - low) for low, high in pairwise(found)]
    wide = [middle for middle, gap in gaps if gap > 1e-3 * middle and gap > 1e-8]
    picked = [wide[i] for i in np.linspace(0, len(wide) - 1, min(count, len(wide))).astype(int)] if wide else []
    return [*picked, 2 * max(found) + 1e-3]
