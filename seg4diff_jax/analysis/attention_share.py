"""Measures how much of each block's attention goes from image tokens to text tokens.

In a joint softmax, every image token divides its attention between image and text. The block that aligns the two best
gives more to the text than other blocks do (Seg4Diff, section 3). So it can be found without any label.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.passes import NoisedImages, attention

ALL_TEXT = AttentionRequest(scores=False, text_tokens=(0, None))


@partial(jax.jit, static_argnames=("kernel",))
def text_shares(
    transformer: MMDiT,
    images: NoisedImages,
    texts: TextConditioning,
    *,
    kernel: Kernel | None = None,
) -> Float[Array, "prompts blocks heads"]:
    """Returns the share of attention that image tokens give to text, 0 to 1, in each block that the transformer holds.

    It is the mean over image tokens.
    """
    blocks = tuple(range(transformer.depth))
    records = attention(transformer, images, texts, blocks=blocks, options=ForwardOptions(ALL_TEXT, kernel))
    # The sum is inside the jitted program, so that no map is kept.
    shares = [records[block].probs.sum(axis=-1).mean(axis=-1) for block in blocks]  # pyright: ignore
    return jnp.stack(shares, axis=1)


def uniform_share(image_tokens: int, text_tokens: int) -> float:
    """Returns the share that uniform attention would give to text."""
    return text_tokens / (image_tokens + text_tokens)
