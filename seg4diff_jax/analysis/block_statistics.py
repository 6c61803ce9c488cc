"""Shares of attention, value norms and similarities of every block, computed inside the pass that runs the blocks.

In a joint softmax, every token divides its attention between image and text. The block that aligns the two best gives
more to the text than others do, and its text tokens have large values (Seg4Diff, section 3, figures 2, 4 and 28). No
map of image by image tokens is ever made: a share of the image's keys is what the shares of the text's keys leave.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seg4diff_jax.analysis.token_groups import TokenGroups
from seg4diff_jax.models.attention import ForwardOptions, JointQKV, Stream
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel, attention_scores
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.trunk import attentions_at
from seg4diff_jax.passes import NoisedImages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockStatistics:
    """Statistics of joint attention by groups of tokens: the image's first, then the text's. Fp32. A pytree.

    Where several blocks are stacked, blocks follow prompts: [prompts, blocks, ...]. An empty group's are NaN, but as
    the keys of `shares`, where they are 0.

    Attributes:
      shares: how much of their attention queries of a group give to keys of a group, mean over the queries. Of an image
        query group and text key group it is the paper's I2T, and so on; over key groups the sum is 1.
      value_norms: mean over a group's tokens of the L2 norm of each head's values.
      whole_value_norms: the same of all heads' values as one vector.
      similarity: mean cosine similarity of queries, of keys and of values between tokens of two groups, all heads as
        one vector. Our extra: the paper announces "feature similarity" and shows none.
    """

    shares: Float[Array, "*lead heads groups groups"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    value_norms: Float[Array, "*lead heads groups"] | Any
    whole_value_norms: Float[Array, "*lead groups"] | Any
    similarity: Float[Array, "*lead 3 groups groups"] | Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StatisticsReader:
    """Reads `BlockStatistics` of a captured block (see `models.attention.Reader`). A pytree."""

    members: Float[Array, "prompts groups tokens"] | Any
    normalized_queries: tuple[Stream, ...] = field(default=("image", "text"), metadata={"static": True})

    def about(self, conditioning: TextConditioning) -> StatisticsReader:
        tokens = conditioning.context.shape[-2]
        if self.members.shape[-1] != tokens:
            raise ValueError(f"groups are of {self.members.shape[-1]} tokens; this text has {tokens}")
        return self

    def read(self, joint: JointQKV) -> BlockStatistics:
        cut, members = joint.image_tokens, jnp.asarray(self.members, jnp.float32)
        averages = members / members.sum(axis=-1, keepdims=True)  # an empty group's are NaN
        product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

        def shares_of(queries: slice) -> Float[Array, "batch heads queries groups"]:
            scores = attention_scores(joint.q[:, queries], joint.k[:, cut:])
            probs = jnp.exp(scores - joint.normalizer[:, :, queries, None])  # pyright: ignore[reportOptionalSubscript]
            # The image's queries are many, and one group: their mean comes first.
            probs = probs.mean(axis=2, keepdims=True) if queries.start == 0 else probs
            return product("bhqk,bgk->bhqg", probs, members)

        text = product("bgq,bhqk->bhgk", averages, shares_of(slice(cut, None)))
        text = jnp.concatenate([shares_of(slice(0, cut)), text], axis=2)
        shares = jnp.concatenate([1 - text.sum(axis=-1, keepdims=True), text], axis=-1)

        def means(x: Float[Array, "batch tokens *features"]) -> Float[Array, "batch groups *features"]:
            text = product("bgt,bt...->bg...", averages, x[:, cut:])
            return jnp.concatenate([x[:, :cut].mean(axis=1, keepdims=True), text], axis=1)

        squares = jnp.square(joint.v.astype(jnp.float32)).sum(axis=-1)
        whole = means(jnp.sqrt(squares.sum(axis=-1)))
        similarities = []
        for x in (joint.q, joint.k, joint.v):
            flat = x.astype(jnp.float32).reshape(*x.shape[:2], -1)
            # The mean of the cosines of all pairs is the product of the mean directions.
            direction = means(flat * jax.lax.rsqrt(jnp.maximum(jnp.square(flat).sum(axis=-1, keepdims=True), 1e-20)))
            similarities.append(product("bgf,bhf->bgh", direction, direction))
        norms = jnp.moveaxis(means(jnp.sqrt(squares)), 1, 2)
        return BlockStatistics(shares, norms, whole, jnp.stack(similarities, axis=1))


@partial(jax.jit, static_argnames=("blocks", "kernel"))
def block_statistics(
    transformer: MMDiT,
    images: NoisedImages,
    texts: TextConditioning,
    groups: TokenGroups,
    *,
    blocks: tuple[int, ...] | None = None,
    kernel: Kernel | None = None,
) -> BlockStatistics:
    """Returns the statistics of blocks, stacked [prompts, blocks, ...], from one pass that ends in the last of them.

    Args:
      blocks: their numbers, in order. Default: all that the transformer holds.

    Raises as `trunk.attentions_at` does; ValueError also for groups of another text.
    """
    blocks = tuple(range(transformer.depth)) if blocks is None else blocks
    options = ForwardOptions(StatisticsReader(groups.members), kernel)
    latents, timesteps = images.inputs()
    records = attentions_at(transformer, latents, timesteps, texts, blocks=blocks, options=options)
    return jax.tree.map(lambda *each: jnp.stack(each, axis=1), *(records[block] for block in blocks))


def uniform_shares(sizes: Float[np.ndarray, "*prompts groups"]) -> Float[np.ndarray, "*prompts groups"]:
    """Returns the share of each group if attention were uniform: its part of all tokens."""
    return sizes / sizes.sum(axis=-1, keepdims=True)


def text_share(shares: Float[np.ndarray, "*lead groups groups"]) -> Float[np.ndarray, "*lead"]:
    """Returns how much of the image's attention is on text: the sum of the paper's I2T over all text tokens."""
    return 1 - shares[..., 0, 0]
