"""Background by a threshold: pixels whose best class scores less than the threshold are background.

The threshold is a score, or the mean of an object's map over its image. The latter is Chefer et al.'s (CVPR 2021,
`baselines/ViT/imagenet_seg_eval.py` of github.com/hila-chefer/Transformer-Explainability): a pixel is the object where
its score is greater than the mean. ConceptAttention's code does so too on ImageNet-Segmentation.

Several thresholds are counted at once. The pixels of a set are divided into parts, by how many thresholds their best
score reaches, and each part has a confusion matrix. The matrix of every threshold is a sum over parts, in which the
pixels of the lower parts are moved to the background.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from seg4diff_jax.segmentation.average_precision import inside_of
from seg4diff_jax.segmentation.metrics import IGNORED

THRESHOLD_GRID = tuple(float(f"{0.0002 * 2 ** (step / 2):.2g}") for step in range(24))
"""Thresholds to choose from: 0.0002 to 0.58, each about 1.4 times the one before. Scores are attention, 0 to 1."""


def part_of(
    scores: Float[Array, "*pixels"], thresholds: Float[Array, " thresholds"], there: Bool[Array, ""]
) -> Int[Array, "*pixels"]:
    """Returns how many of the ascending thresholds each score reaches; all of them where background is not asked for.

    Args:
      there: whether background is among the classes that the image is asked for.
    """
    reached = jnp.searchsorted(thresholds, scores, side="right")
    return jnp.where(there, reached, len(thresholds)).astype(jnp.int32)


def above_mean(scores: Float[Array, "height width"], size: Int[Array, " 2"]) -> Bool[Array, "height width"]:
    """Returns where scores on a canvas are greater than their mean over the image, unlabelled pixels included.

    Args:
      size: height and width of the image; may be traced.
    """
    return scores > jnp.mean(scores, where=inside_of(size, scores.shape))


def right_pixels(
    labels: Int[Array, "height width"],
    truth: Integer[Array, "height width"],
    part: Int[Array, "height width"],
    background: Int[Array, ""],
    *,
    parts: int,
) -> Int[Array, " thresholds"]:
    """Returns the number of right pixels of an image at each threshold; one number if there is no threshold.

    Args:
      labels: the best class of each pixel, whatever its score.
      part: as `part_of` returns it.
    """
    counted = truth != IGNORED
    if parts == 1:
        return jnp.sum((labels == truth) & counted)[None]
    number = lambda where: jnp.bincount(jnp.where(where & counted, part, parts).reshape(-1), length=parts + 1)[:parts]
    kept, below = number(labels == truth), jnp.cumsum(number(truth == background))
    return (jnp.sum(kept) - jnp.cumsum(kept) + below)[:-1].astype(jnp.int32)


def at_thresholds(
    confusions: Integer[np.ndarray, "*readouts parts classes classes"], background: int
) -> Int[np.ndarray, "*readouts thresholds classes classes"]:
    """Returns the confusion matrix of each threshold, from those of the parts into which thresholds divide pixels."""
    below = np.cumsum(confusions, axis=-3)
    kept = below[..., -1:, :, :] - below[..., :-1, :, :]
    kept[..., background] += below[..., :-1, :, :].sum(axis=-1)
    return kept
