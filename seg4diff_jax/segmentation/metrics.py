"""How well label maps agree: one confusion matrix over a whole data set, and what is read from it.

Row = true class, column = predicted class, pixels with the ignored label left out. mIoU is the mean of the classes'
intersection over union, over those classes that occur in truth (detectron2's SemSegEvaluator).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

IGNORED = 255


def confusion_matrix(
    truth: Integer[Array, "*pixels"], predicted: Integer[Array, "*pixels"], classes: int, ignored: int = IGNORED
) -> Int[Array, "classes classes"]:
    """Pixels of each (true, predicted) pair; works under jit. Sum matrices of many images in int64 on the host.

    Labels other than `ignored` must be in 0 to `classes` - 1, predictions always.
    """
    truth, predicted = truth.astype(jnp.int32).reshape(-1), predicted.astype(jnp.int32).reshape(-1)
    counted = truth != ignored
    pairs = jnp.where(counted, truth * classes + predicted, classes**2)
    counts = jnp.bincount(pairs, length=classes**2 + 1).astype(jnp.int32)
    return counts[:-1].reshape(classes, classes)


def iou_per_class(confusion: Integer[np.ndarray, "classes classes"]) -> Float[np.ndarray, " classes"]:
    """Intersection over union in 0..1; NaN for a class that does not occur in truth."""
    hit = np.diagonal(confusion).astype(np.float64)
    true = confusion.sum(axis=1)
    union = confusion.sum(axis=0) + true - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=true > 0)


def mean_iou(confusion: Integer[np.ndarray, "classes classes"], subset: Sequence[int] | None = None) -> float:
    """Mean over the classes that occur, in 0..1; over those of `subset` alone if given. NaN if none occurs.

    A subset's pixels are still confused with every class: things' mIoU falls when they are taken for stuff.
    """
    scores = iou_per_class(confusion)
    scores = scores if subset is None else scores[np.asarray(subset, int)]
    scores = scores[~np.isnan(scores)]
    return float(scores.mean()) if len(scores) else float("nan")


def accuracy_per_class(confusion: Integer[np.ndarray, "classes classes"]) -> Float[np.ndarray, " classes"]:
    """Share of each class's pixels that are right, 0..1; NaN for a class that does not occur in truth."""
    true = confusion.sum(axis=1)
    return np.divide(np.diagonal(confusion), true, out=np.full(len(true), np.nan), where=true > 0)


def pixel_accuracy(confusion: Integer[np.ndarray, "classes classes"]) -> float:
    """Share of the pixels counted whose class is right; NaN if none is counted."""
    total = confusion.sum()
    return float(np.diagonal(confusion).sum() / total) if total else float("nan")
