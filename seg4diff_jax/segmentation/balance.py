"""Makes the maps of different classes comparable: words differ in how much attention they draw, wherever they are."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from seg4diff_jax.segmentation.mask_options import Normalization

TINY = float(jnp.finfo(jnp.float32).tiny)


def normalized(
    maps: Float[Array, "prompts classes tokens"],
    probs: Float[Array, "prompts tokens text"],
    averaging: Float[Array, "prompts classes text"],
    how: Normalization,
) -> Float[Array, "prompts classes tokens"]:
    """Normalises class maps.

    Args:
      maps: mean attention of each image token to each class's words.
      probs: the attention that they are made of.
      averaging: the weights that made them; text tokens of a weight above 0 are the content.
      how: `none`; `content`, each image token's attention in parts of what it gives to all content; `minmax`, each map
        from 0 to 1 over the image. A constant map becomes 0.
    """
    if how == "content":
        is_content = (averaging > 0).any(axis=1)
        to_content = jnp.where(is_content[:, None], probs, 0).sum(axis=-1)
        return maps / jnp.maximum(to_content, TINY)[:, None]
    return minmax(maps) if how == "minmax" else maps


def minmax(maps: Float[Array, "prompts classes tokens"]) -> Float[Array, "prompts classes tokens"]:
    """Brings each map from 0 to 1 over the image. A constant map becomes 0."""
    least, greatest = maps.min(axis=-1, keepdims=True), maps.max(axis=-1, keepdims=True)
    return (maps - least) / jnp.maximum(greatest - least, TINY)


def balanced(maps: Float[Array, "prompts classes tokens"], power: float) -> Float[Array, "prompts classes tokens"]:
    """Divides each map by its mean over the image to a power. A map of zeros stays one. Power 0 changes nothing."""
    if not power:
        return maps
    return maps / jnp.maximum(maps.mean(axis=-1, keepdims=True), TINY) ** power
