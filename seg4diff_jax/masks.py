"""Masks from pixels: the programs that take images, noise and prompts to class scores, and to attention maps."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seg4diff_jax.flow import add_noise
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions, JointAttention
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.trunk import attention_at, attentions_at
from seg4diff_jax.models.vae import VAE
from seg4diff_jax.segmentation.open_vocabulary import class_scores, combine_prompts


@jax.jit
def image_latents(
    vae: VAE, pixels: Float[Array, "batch height width 3"]
) -> Float[Array, "batch rows columns channels"]:
    """Clean latents of pixels in -1..1."""
    return vae.encode(pixels)


@partial(jax.jit, static_argnames=("block", "kernel"))
def read_class_scores(
    transformer: MMDiT,
    vae: VAE,
    images: tuple[Float[Array, "images height width 3"], Float[Array, "images rows columns channels"]],
    prompts: tuple[TextConditioning, Int[Array, " prompts"], Float[Array, "prompts classes text"]],
    sigma: Float[Array, ""],
    block: int,
    kernel: Kernel | None,
) -> Float[Array, "images classes grid_rows grid_columns"]:
    """Images and noise, and for each prompt its conditioning, its image and its averaging weights, to class scores."""
    pixels, noise = images
    conditioning, image_of_prompt, averaging = prompts
    noisy = add_noise(vae.encode(pixels).astype(jnp.float32), noise, sigma)
    request = AttentionRequest(scores=False, mean_heads=True)
    record = attention_at(
        transformer,
        noisy[image_of_prompt],
        jnp.full(len(image_of_prompt), 1000 * sigma, jnp.float32),
        conditioning,
        block=block,
        options=ForwardOptions(request, kernel),
    )
    assert record.probs is not None
    scores = combine_prompts(class_scores(record.probs, averaging), image_of_prompt, len(pixels))
    patch = transformer.config.patch_size
    return scores.reshape(*scores.shape[:2], noise.shape[1] // patch, noise.shape[2] // patch)


@partial(jax.jit, static_argnames=("blocks", "options"))
def read_attention(
    transformer: MMDiT,
    vae: VAE,
    images: tuple[Float[Array, "images height width 3"], Float[Array, "images rows columns channels"]],
    conditioning: TextConditioning,
    sigma: Float[Array, ""] | float,
    blocks: tuple[int, ...],
    options: ForwardOptions,
) -> dict[int, JointAttention]:
    """Joint attention of blocks on images and noise at level sigma, in one pass that ends in the last of the blocks."""
    pixels, noise = images
    noisy = add_noise(vae.encode(pixels).astype(jnp.float32), noise, sigma)
    timesteps = jnp.full(len(pixels), 1000 * sigma, jnp.float32)
    return attentions_at(transformer, noisy, timesteps, conditioning, blocks=blocks, options=options)
