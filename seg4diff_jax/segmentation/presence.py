"""Is a class in the picture at all? Scores of presence, from the maps that make masks, and how well they tell.

Every pixel goes to one of the classes that a prompt names, whether or not the picture has them. A score of presence
says of each class how much speaks for it. It is compared with the labels over many images: by the area under the
receiver's curve, by F1 at a threshold that other images chose, and by calibration.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SCORES = ("area", "share", "peak")
"""The scores of presence, see `presence_scores`."""
SHARPEST = 32
"""`share` is read where it is greatest, on one in so many image tokens."""
FOLDS = 10
BINS = 10


def presence_scores(
    scores: Float[Array, "classes tokens"], asked: Bool[Array, " classes"]
) -> Float[Array, "3 classes"]:
    """Returns how much speaks for each class, 0..1, in the order of `SCORES`.

    area: the share of image tokens on which its score is the highest of all classes that are asked for (ties: the
      earlier class's). It looks at what the mask covers.
    share: its part in the sum of the scores of all these classes, averaged over the one in `SHARPEST` tokens where it
      is greatest. It looks at how clearly the best spot is the class's.
    peak: its highest score. It compares with no other class.

    Args:
      scores: mean attention of each image token to the class's words, not negative.
      asked: which classes the prompts name; the score of others has no meaning.
    """
    scores = jnp.where(asked[:, None], scores.astype(jnp.float32), 0)
    winners = jnp.argmax(jnp.where(asked[:, None], scores, -jnp.inf), axis=0)
    area = jnp.mean(winners == jnp.arange(len(scores))[:, None], axis=1)
    shares = scores / jnp.maximum(scores.sum(axis=0), jnp.finfo(jnp.float32).tiny)
    sharpest, _ = jax.lax.top_k(shares, -(-scores.shape[1] // SHARPEST))
    return jnp.stack([area, sharpest.mean(axis=1), scores.max(axis=1)])


# ---- on the host: how well scores tell present from absent ----------------------------------------------------------


def auc(scores: Float[np.ndarray, " cases"], present: Bool[np.ndarray, " cases"]) -> float:
    """Returns how often a present case scores higher than an absent one, ties counting half, 0..1.

    This is the area under the receiver's curve (Mann and Whitney's U over the number of pairs). NaN if all cases are
    present, or all absent.
    """
    positives = int(present.sum())
    pairs = positives * (len(present) - positives)
    if not pairs:
        return float("nan")
    _, place, alike = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(alike) - (alike - 1) / 2  # from 1; cases of one score have the mean of their ranks
    return float((ranks[place][present].sum() - positives * (positives + 1) / 2) / pairs)


def auc_of_each(
    scores: Float[np.ndarray, "groups cases"], present: Bool[np.ndarray, "groups cases"]
) -> Float[np.ndarray, " groups"]:
    """Returns `auc` within each row. Cases whose score is NaN were not asked for, and are left out."""
    asked = ~np.isnan(scores)
    return np.array([auc(s[a], p[a]) for s, p, a in zip(scores, present, asked, strict=True)], np.float64)


def best_threshold(scores: Float[np.ndarray, " cases"], present: Bool[np.ndarray, " cases"]) -> float:
    """Returns the score from which on to say "present", so that F1 is highest; of several the highest.

    NaN if no case is present.
    """
    if not present.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(present[order])
    last = np.append(ordered[1:] != ordered[:-1], True)  # all cases of one score are said to be present together
    f1 = 2 * hits / (np.arange(1, len(ordered) + 1) + present.sum())
    return float(ordered[np.argmax(np.where(last, f1, -1.0))])


def held_out_f1(
    scores: Float[np.ndarray, "images classes"], present: Bool[np.ndarray, "images classes"], folds: int = FOLDS
) -> float:
    """Returns F1 over all images and classes, 0..1, where each image is decided at a threshold that others chose.

    Images are dealt to `folds` folds in turn; the threshold of a fold is the best of all others together. With up to
    `folds` images each is decided by all the others. NaN if there is no threshold for a fold, or nothing is present.
    """
    fold = np.arange(len(scores)) % folds
    asked = ~np.isnan(scores)
    hits = claims = 0
    for one in range(min(folds, len(scores))):
        own, others = fold == one, fold != one
        threshold = best_threshold(scores[others][asked[others]], present[others][asked[others]])
        if np.isnan(threshold):
            return float("nan")
        said = asked[own] & (np.nan_to_num(scores[own]) >= threshold)
        hits += int((said & present[own]).sum())
        claims += int(said.sum())
    positives = int((present & asked).sum())
    return 2 * hits / (claims + positives) if positives else float("nan")


class Reliability(NamedTuple):
    """Cases in bins of equal width of their scores, from 0 to 1; a score of 1 is in the last.

    Attributes:
      cases: how many.
      score: their mean score; NaN in an empty bin.
      present: which share of them is present; NaN in an empty bin.
    """

    cases: Int[np.ndarray, " bins"]
    score: Float[np.ndarray, " bins"]
    present: Float[np.ndarray, " bins"]

    @property
    def error(self) -> float:
        """The expected calibration error, 0..1: |score - present| averaged over cases; NaN without a case."""
        filled = self.cases > 0
        weights = self.cases[filled] / max(1, self.cases.sum())
        apart = np.abs(self.score[filled] - self.present[filled])
        return float(weights @ apart) if filled.any() else float("nan")


def reliability(
    scores: Float[np.ndarray, " cases"], present: Bool[np.ndarray, " cases"], bins: int = BINS
) -> Reliability:
    """Compares scores in 0..1, read as probabilities, with how often a class is present (Guo et al. 2017)."""
    place = np.clip((scores * bins).astype(np.int64), 0, bins - 1)
    cases = np.bincount(place, minlength=bins)
    mean = lambda values: np.divide(
        np.bincount(place, weights=values, minlength=bins), cases, out=np.full(bins, np.nan), where=cases > 0
    )
    return Reliability(cases, mean(scores.astype(np.float64)), mean(present.astype(np.float64)))
