"""Pictures from prompts: the programs that take noise to latents, and latents to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from seg4diff_jax.flow import euler, guided, is_whole
from seg4diff_jax.models.attention import ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.vae import VAE
from seg4diff_jax.parallel import on_host


@partial(jax.jit, static_argnames=("kernel",))
def sample_latents(
    transformer: MMDiT,
    noise: Float[Array, "images rows columns channels"],
    prompts: TextConditioning,
    negative: TextConditioning | None,
    sigmas: Float[Array, " steps"],
    guidance: Float[Array, ""],
    kernel: Kernel | None = None,
) -> Float[Array, "images rows columns channels"]:
    """Clean latents from noise, fp32 between the steps, in one program whatever the number of steps.

    Args:
      prompts: conditioning of each image.
      negative: conditioning to lead away from, of each image or one row for all; None takes one forward pass per
        image and step instead of two, and the velocity as it is.
      sigmas: noise levels, falling; the clean end is left out (`FlowSchedule.sigmas`).
      guidance: scale of the way from `negative` to `prompts`; 1 leads to `prompts` exactly.
      kernel: see `ForwardOptions`.

    Raises:
      ValueError: the transformer lacks its last blocks, or latents do not fit it.
    """
    conditioning = prompts if negative is None else jax.tree.map(_side_by_side, prompts, negative)

    def velocity(
        latents: Float[Array, "images rows columns channels"], sigma: Float[Array, ""]
    ) -> Float[Array, "images rows columns channels"]:
        seen = latents if negative is None else _side_by_side(latents, latents)
        timesteps = jnp.full(len(seen), 1000 * sigma, jnp.float32)
        predicted, _ = transformer(seen, timesteps, conditioning, options=ForwardOptions(kernel=kernel))
        predicted = predicted.astype(jnp.float32)
        if negative is None:
            return predicted
        pairs = predicted.reshape(-1, 2, *predicted.shape[1:])
        return guided(pairs[:, 0], pairs[:, 1], guidance)

    return euler(velocity, noise, sigmas)


def _side_by_side(first: Float[Array, "rows ..."], second: Float[Array, "_ ..."]) -> Float[Array, "both ..."]:
    """Row by row in turn, so that both rows of an image lie on its device; `second` may be one row for all."""
    return jnp.stack([first, jnp.broadcast_to(second, first.shape)], axis=1).reshape(-1, *first.shape[1:])


@jax.jit
def decode_pictures(
    vae: VAE, latents: Float[Array, "images rows columns channels"]
) -> tuple[UInt8[Array, "images height width 3"], Bool[Array, ""]]:
    """Latents to pixels 0..255, rounded, and whether all of them were finite."""
    pixels = vae.decode(latents).astype(jnp.float32)
    levels = jnp.round(255 * jnp.clip(pixels / 2 + 0.5, 0, 1))
    return levels.astype(jnp.uint8), jnp.isfinite(pixels).all()


def finite_pictures(
    vae: VAE, latents: Float[Array, "images rows columns channels"]
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Decoded, on the host. Raises FloatingPointError for pixels that are not finite."""
    pictures, finite = map(on_host, decode_pictures(vae, latents))
    if not finite:
        raise FloatingPointError("the picture's pixels are not finite: the weights are damaged")
    return list(pictures)


def one_for_each(prompts: Sequence[str], images_per_prompt: int) -> list[str]:
    """The prompt of each image, those of the first prompt first.

    Raises ValueError unless `images_per_prompt` is a whole number, at least 1.
    """
    if not is_whole(images_per_prompt, 1):
        raise ValueError(f"images_per_prompt is {images_per_prompt!r}; expected a whole number, at least 1")
    return [prompt for prompt in prompts for _ in range(images_per_prompt)]
