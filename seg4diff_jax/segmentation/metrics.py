"""Scores of label maps, from one confusion matrix over a whole data set.

Rows are true classes and columns predicted classes. Pixels with the void label are left out. mIoU is the mean
intersection over union of the classes that occur in the ground truth (as in detectron2's SemSegEvaluator).
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
    """Counts the pixels of each (true, predicted) pair of classes; works under jit.

    Predictions must be in 0 to `classes` - 1, and so must true labels other than `ignored`. Add up the matrices of many
    images in int64 on the host.
    """
    return confusion_matrices(truth, predicted, jnp.zeros((), jnp.int32), classes, ignored, parts=1)[0]


def confusion_matrices(
    truth: Integer[Array, "*pixels"],
    predicted: Integer[Array, "*pixels"],
    part: Integer[Array, ...],
    classes: int,
    ignored: int = IGNORED,
    *,
    parts: int,
) -> Int[Array, "parts classes classes"]:
    """Counts as `confusion_matrix` does, each part of the pixels by itself.

    Args:
      part: the part of each pixel, 0 to `parts` - 1, or of all pixels.
    """
    truth, predicted, part = (each.astype(jnp.int32) for each in (truth, predicted, part))
    pairs = jnp.where(truth != ignored, (part * classes + truth) * classes + predicted, parts * classes**2)
    counts = jnp.bincount(pairs.reshape(-1), length=parts * classes**2 + 1).astype(jnp.int32)
    return counts[:-1].reshape(parts, classes, classes)


def iou_per_class(confusion: Integer[np.ndarray, "classes classes"]) -> Float[np.ndarray, " classes"]:
    """Returns intersection over union of each class, 0..1; NaN for a class that the ground truth does not have."""
    hit = np.diagonal(confusion).astype(np.float64)
    true = confusion.sum(axis=1)
    union = confusion.sum(axis=0) + true - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=true > 0)


def mean_iou(confusion: Integer[np.ndarray, "classes classes"], subset: Sequence[int] | None = None) -> float:
    """Returns the mean IoU of the classes that occur in the ground truth, 0..1; NaN if none occurs.

    Args:
      subset: average over these classes alone. Confusion with other classes still counts: the mIoU of things falls when
        things are predicted as stuff.
    """
    scores = iou_per_class(confusion)
    scores = scores if subset is None else scores[np.asarray(subset, int)]
    scores = scores[~np.isnan(scores)]
    return float(scores.mean()) if len(scores) else float("nan")


def accuracy_per_class(confusion: Integer[np.ndarray, "classes classes"]) -> Float[np.ndarray, " classes"]:
    """Returns the share of each class's pixels that are right, 0..1; NaN for a class that the ground truth lacks."""
    true = confusion.sum(axis=1)
    return np.divide(np.diagonal(confusion), true, out=np.full(len(true), np.nan), where=true > 0)


def pixel_accuracy(confusion: Integer[np.ndarray, "classes classes"]) -> float:
    """Returns the share of the counted pixels that are right, 0..1; NaN if no pixel is counted."""
    total = confusion.sum()
    return float(np.diagonal(confusion).sum() / total) if total else float("nan")
