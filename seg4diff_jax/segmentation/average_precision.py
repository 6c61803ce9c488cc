"""The average precision of a map that tells an object from its background, over the pixels of one image.

The figure is that of Chefer et al. (CVPR 2021, arXiv 2012.09838; `utils/metrices.py` and `baselines/ViT/
imagenet_seg_eval.py` of github.com/hila-chefer/Transformer-Explainability), which they call mAP as a mean over images:

- The map is brought to 0..1 by its least and its greatest value in the image. Where it is the same everywhere, all
  scores are 0.
- The scores of the foreground, s, and those of the background, 1 - s, are taken together, each pixel twice: it is
  positive once as what it is. So this is not the average precision of the foreground alone.
- Average precision is scikit-learn's `average_precision_score`: the sum over different scores, from the greatest, of
  precision times the gain in recall. Nothing is interpolated. Equal scores are one step.

ConceptAttention's code (arXiv 2502.04320) does the same on ImageNet-Segmentation. On VOC its scores are not brought to
0..1 before, so that 1 - s has another meaning; that is not followed here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from seg4diff_jax.segmentation.metrics import IGNORED


def object_precision(
    scores: Float[Array, "height width"],
    truth: Integer[Array, "height width"],
    size: Int[Array, " 2"],
    foreground: int,
) -> Float[Array, ""]:
    """Returns the average precision of an image, 0..1; 0 if it has no labelled pixel. Works under jit and vmap.

    Args:
      scores: how much each pixel is the object, on a canvas; values past `size` have no meaning.
      truth: labels on the canvas, `IGNORED` where nobody labelled, whose pixels count only for the least and the
        greatest score.
      size: height and width of the image; may be traced.
      foreground: the object's label. All others are background.
    """
    inside = inside_of(size, scores.shape)
    least = jnp.min(scores, where=inside, initial=jnp.inf)
    span = jnp.max(scores, where=inside, initial=-jnp.inf) - least
    # Behind the barrier XLA divides each score. Otherwise it would multiply by a rounded reciprocal, and some scores s
    # and 1 - s that are equal, which is one step, would be two (findings/xla_cpu_divides_by_a_reciprocal.sh).
    divisor = jax.lax.optimization_barrier(jnp.broadcast_to(jnp.where(span > 0, span, 1), scores.shape))
    own = jnp.where(span > 0, (scores - least) / divisor, 0)
    other = jnp.where(span > 0, 1 - own, 0)
    counted = inside & (truth != IGNORED)
    both = lambda first, second: jnp.concatenate([first.reshape(-1), second.reshape(-1)])
    positive = both(counted & (truth == foreground), counted & (truth != foreground))
    return average_precision(both(own, other), positive, both(counted, counted))


def average_precision(
    scores: Float[Array, " cases"], positive: Bool[Array, " cases"], counted: Bool[Array, " cases"]
) -> Float[Array, ""]:
    """Returns scikit-learn's average precision of the cases that are counted; 0 if none of them is positive.

    Args:
      scores: finite where counted.
      positive: which cases are; none that is not counted.
    """
    # In the order of falling scores; those last that are not counted.
    falling = jnp.where(counted, -scores, jnp.inf)
    falling, hits, cases = jax.lax.sort((falling, positive.astype(jnp.int32), counted.astype(jnp.int32)), num_keys=1)
    hits, cases = jnp.cumsum(hits), jnp.cumsum(cases)
    last = jnp.append(falling[1:] != falling[:-1], True)  # of equal scores
    before = jax.lax.cummax(jnp.where(last, hits, 0))
    gained = jnp.where(last, hits - jnp.append(jnp.zeros(1, hits.dtype), before[:-1]), 0)
    return _pairwise_sum(gained * (hits / jnp.maximum(cases, 1))) / jnp.maximum(hits[-1], 1)


def _pairwise_sum(values: Float[Array, " values"]) -> Float[Array, ""]:
    """Adds values in fp32 with the error of a few additions. One after the other, 1e5 values lose four digits."""
    values = jnp.pad(values, (0, (1 << (len(values) - 1).bit_length()) - len(values)))
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]


def inside_of(size: Int[Array, " 2"], canvas: tuple[int, ...]) -> Bool[Array, "height width"]:
    """Returns which pixels of a canvas belong to an image of that height and width."""
    return (jnp.arange(canvas[0]) < size[0])[:, None] & (jnp.arange(canvas[1]) < size[1])
