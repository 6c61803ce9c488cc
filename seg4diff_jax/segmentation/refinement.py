"""Refines class maps: image tokens that attend to each other share their scores.

A map is averaged over the image tokens by the model's own image-to-image attention, softmax(b q k'), which is computed
with the map as its values. So a round costs a call of the fused kernel, and nothing of tokens x tokens is ever held.
iSeg (arXiv 2409.03209) and DiffSegmenter (arXiv 2309.02773) refine maps of U-Nets by stored self-attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from seg4diff_jax.models.kernels import Kernel, attend, default_kernel


def refined(
    maps: Float[Array, "rows classes tokens"],
    q: Float[Array, "rows tokens heads head_dim"],
    k: Float[Array, "rows tokens heads head_dim"],
    *,
    sharpness: float,
    heads: Sequence[int] | None = None,
    kernel: Kernel | None = None,
) -> Float[Array, "rows classes tokens"]:
    """Averages each map over the image tokens that each token attends to: one round, mean over heads, fp32.

    A map's largest value does not grow, and a constant map stays as it is.

    Args:
      q, k: queries and keys of the image tokens in one block.
      sharpness: factor of the queries.
      heads: which heads; None: all.
      kernel: attention kernel. A fused one takes as many maps at a time as a head is wide.
    """
    if heads is not None:
        q, k = q[:, :, jnp.array(heads)], k[:, :, jnp.array(heads)]
    q = (sharpness * q.astype(jnp.float32)).astype(q.dtype)
    width, kernel = q.shape[-1], kernel or default_kernel(q.dtype, q.shape[-1])
    # Of 16 bits few would be left to values near zero: each map is brought to 1 at its largest.
    largest = jnp.maximum(jnp.abs(maps).max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    values = jnp.moveaxis(maps / largest, 1, 2)[:, :, None]
    if kernel.name == "xla":
        pieces = [values]
    else:
        short = -values.shape[-1] % width
        values = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, short)))
        pieces = jnp.split(values, values.shape[-1] // width, axis=-1)
    shared = [jnp.broadcast_to(piece, (*q.shape[:3], piece.shape[-1])).astype(q.dtype) for piece in pieces]
    each = [attend(q, k, piece, kernel=kernel)[0].astype(jnp.float32).mean(axis=2) for piece in shared]
    averaged = jnp.concatenate(each, axis=-1)[..., : maps.shape[1]]
    return jnp.moveaxis(averaged, 1, 2) * largest
