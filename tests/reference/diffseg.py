"""DiffSeg in plain loops over maps: NumPy in double precision, with the whole matrix of attention."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from tests.reference.unsupervised import symmetric_kl


def attention(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """[tokens, heads, head_dim] to [tokens, tokens]: the mean over heads."""
    heads = [q[:, head] @ k[:, head].T / np.sqrt(q.shape[2]) for head in range(q.shape[1])]
    return np.mean([softmax(scores, axis=1) for scores in heads], axis=0)


def first_round(maps: np.ndarray, anchors: list[int], threshold: float) -> list[np.ndarray]:
    return [np.mean([each for each in maps if symmetric_kl(maps[at], each) < threshold], axis=0) for at in anchors]


def next_round(maps: list[np.ndarray], threshold: float) -> list[np.ndarray]:
    """Each map that none before has claimed claims all that are near it, whoever has claimed them."""
    claimed: set[int] = set()
    found = []
    for at, first in enumerate(maps):
        if at not in claimed:
            near = [other for other, each in enumerate(maps) if symmetric_kl(first, each) < threshold]
            claimed |= {at, *near}
            found.append(np.mean([maps[other] for other in near], axis=0))
    return found


def merged(maps: np.ndarray, anchors: list[int], threshold: float, rounds: int) -> tuple[np.ndarray, float]:
    """Merged maps [segments, tokens], and how near to the threshold a divergence came, in parts of the threshold."""
    nearest, found = np.inf, first_round(maps, anchors, threshold)
    pairs = [(maps[at], each) for at in anchors for each in maps]
    for _ in range(rounds - 1):
        pairs += [(x, y) for x in found for y in found]
        found = next_round(found, threshold)
    apart = np.array([symmetric_kl(x, y) for x, y in pairs])
    nearest = np.abs(apart / threshold - 1).min()
    return np.array(found), float(nearest)
