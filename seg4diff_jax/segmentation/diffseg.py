"""DiffSeg (Tian and others, CVPR 2024, arXiv 2308.12469): image tokens that attend to the same places are one segment.

    q, k -> maps of image-to-image attention -> near_anchors -> merge, ROUNDS times in all -> upsample, arg-max

Each image token has a map: its attention to all image tokens, mean over heads. Tokens on a grid are anchors. The first
round replaces each anchor's map by the mean of all tokens' maps that are near it. Further rounds merge maps that are
near each other, so that none is left twice. The original averages the maps of a U-Net's resolutions; here there is one.

What is held of an image: the maps of its anchors, and those of a few tokens at a time, never of tokens x tokens.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seg4diff_jax.models.kernels import CHUNK_BYTES, attention_scores
from seg4diff_jax.segmentation.unsupervised import Segments, merge

ANCHORS = 16
"""Anchors along each side of the image, as published; on smaller grids every token is one."""
ROUNDS = 3
"""How often maps are merged, as published."""
TINY = float(jnp.finfo(jnp.float32).tiny)


def anchor_tokens(grid: tuple[int, int]) -> Int[np.ndarray, " anchors"]:
    """Returns the tokens that are anchors: evenly spaced, in the middle of the grid, row by row.

    Args:
      grid: rows and columns of image tokens.
    """

    def along(side: int) -> Int[np.ndarray, " places"]:
        count = min(ANCHORS, side)
        apart = (side - 1) // max(1, count - 1)
        return (side - 1 - apart * (count - 1)) // 2 + apart * np.arange(count)

    return (along(grid[0])[:, None] * grid[1] + along(grid[1])).reshape(-1)


def log_maps(
    q: Float[Array, "queries heads head_dim"], k: Float[Array, "image heads head_dim"]
) -> Float[Array, "queries image"]:
    """Returns the logarithms of image-to-image attention, a softmax over image tokens, averaged over heads; fp32.

    Logarithms stay finite where probabilities are too small for fp32.
    """
    log_probs = jax.nn.log_softmax(attention_scores(q[None], k[None])[0], axis=-1)
    return jax.nn.logsumexp(log_probs, axis=0) - math.log(q.shape[1])


def divergences(some: Float[Array, "some image"], others: Float[Array, "others image"]) -> Float[Array, "some others"]:
    """Returns the symmetric KL divergence of each of some maps from each of others, in nats, given their logarithms.

    By products of matrices, many times as quick as `unsupervised.divergences`. What all maps have in common is taken
    out of the logarithms first: it changes no divergence, and would round more than small ones are.
    """
    own, theirs, common = jnp.exp(some), jnp.exp(others), some.mean(axis=0)
    some, others = some - common, others - common
    entropies = (own * some).sum(axis=1)[:, None] + (theirs * others).sum(axis=1)
    product = lambda x, y: jnp.matmul(x, y.T, precision="highest")
    return (entropies - product(own, others) - product(some, theirs)) / 2


def near_anchors(
    q: Float[Array, "image heads head_dim"],
    k: Float[Array, "image heads head_dim"],
    anchors: Int[np.ndarray, " anchors"],
    thresholds: Float[Array, " thresholds"],
    *,
    chunk: int,
) -> Float[Array, "thresholds anchors image"]:
    """Returns, for each anchor, the mean of all tokens' maps that are nearer to its own than a threshold.

    Its own is always among them.

    Args:
      chunk: how many tokens' maps are held at a time.
    """
    tokens, count = len(q), -(-len(q) // chunk)
    log_own = log_maps(q[anchors], k)

    def add(sums: tuple[Array, Array], piece: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        queries, places = piece
        log_rows = log_maps(queries, k)
        near = (divergences(log_own, log_rows) < thresholds[:, None, None]) | (anchors[:, None] == places)
        near = (near & (places < tokens)).astype(jnp.float32)
        return (
            sums[0] + jnp.einsum("tac,ci->tai", near, jnp.exp(log_rows), precision="highest"),
            sums[1] + near.sum(axis=2),
        ), None

    padded = jnp.pad(q, ((0, count * chunk - tokens), (0, 0), (0, 0))).reshape(count, chunk, *q.shape[1:])
    none = jnp.zeros((len(thresholds), len(anchors)))
    places = jnp.arange(count * chunk).reshape(count, chunk)
    (total, number), _ = jax.lax.scan(add, (jnp.zeros((*none.shape, tokens)), none), (padded, places))
    return total / number[..., None]


def diffseg(
    q: Float[Array, "image heads head_dim"],
    k: Float[Array, "image heads head_dim"],
    thresholds: Float[Array, " thresholds"],
    *,
    grid: tuple[int, int],
    chunk: int | None = None,
) -> Segments:
    """Returns the merged maps of one image at each threshold. Each map sums to 1. It works under jit and vmap.

    Args:
      q, k: queries and keys of the image tokens in one block.
      thresholds: maps are near each other whose divergence, in nats, is smaller.
      grid: rows and columns of image tokens.
      chunk: how many tokens' maps are held at a time. Default: as many as keep their scores within CHUNK_BYTES.
    """
    tokens, heads = q.shape[:2]
    chunk = chunk or min(tokens, max(1, CHUNK_BYTES // (4 * heads * tokens)))
    first = near_anchors(q, k, anchor_tokens(grid), thresholds, chunk=chunk)

    def further(one: tuple[Array, Array]) -> Segments:
        maps, threshold = one
        segments = Segments(maps, jnp.int32(len(maps)))
        for _ in range(ROUNDS - 1):
            logs = jnp.log(jnp.maximum(segments.maps, TINY))
            segments = merge(segments.maps, divergences(logs, logs), threshold, present=segments.present())
        return segments

    return jax.lax.map(further, (first, thresholds))
