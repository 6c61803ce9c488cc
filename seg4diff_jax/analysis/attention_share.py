"""How much of each block's attention goes from the image to the text.

In a joint softmax every image token divides its attention between the image and the words. The block that aligns the
two best gives the words more than others do (Seg4Diff, section 3), so that it can be found without a single label.
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
    """Share of the image tokens' attention that is on text, 0 to 1, in each block that the transformer holds.

    It is the mean over image tokens.
    """
    blocks = tuple(range(transformer.depth))
    records = attention(transformer, images, texts, blocks=blocks, options=ForwardOptions(ALL_TEXT, kernel))
    # Reduced inside the program, which then keeps no map.
    shares = [records[block].probs.sum(axis=-1).mean(axis=-1) for block in blocks]  # pyright: ignore
    return jnp.stack(shares, axis=1)


def uniform_share(image_tokens: int, text_tokens: int) -> float:
    """The share that attention without any preference would put on text."""
    return text_tokens / (image_tokens + text_tokens)
