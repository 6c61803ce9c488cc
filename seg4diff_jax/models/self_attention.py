"""Softmax self-attention, as the text encoders use it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seg4diff_jax.parallel import split_batch


class SelfAttention(nnx.Module):
    """Self-attention: projections to queries, keys and values, softmax attention, and an output projection.

    Matrix products take their inputs in `dtype`. The softmax and the result are fp32, because the caller adds the
    result to a residual stream in fp32.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        use_bias: bool,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        inner = heads * head_dim
        options = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.q, self.k, self.v = (nnx.Linear(width, inner, **options) for _ in range(3))
        self.out = nnx.Linear(inner, width, preferred_element_type=jnp.float32, **options)
        self.heads = heads

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        *,
        scale: float | None = None,
        bias: Float[Array, "heads tokens tokens"] | None = None,
        causal: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """Returns the attention output of each token, fp32.

        Args:
          x: the normalised sequence.
          scale: factor of q.k; default: 1 / sqrt(head_dim).
          bias: added to the scaled scores, the same for the whole batch.
          causal: a token attends only to itself and to the tokens before it.
        """
        x = split_batch(x)
        q, k, v = (project(x).reshape(*x.shape[:2], self.heads, -1) for project in (self.q, self.k, self.v))
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        scores = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        if bias is not None:
            scores = scores + bias
        if causal:
            scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        probs = jax.nn.softmax(scores).astype(v.dtype)
        return split_batch(self.out(jnp.einsum("bhqk,bkhd->bqhd", probs, v).reshape(*x.shape[:2], -1)))
