"""One model on batches of images, as all protocols read it: images and prompts encoded, attention recorded.

Of every batch images are encoded once, and prompts once for as long as they are remembered; each noise level and seed
is one pass of the transformer, in which all blocks and heads asked for are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seg4diff_jax.flow import image_noise
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.passes import NoisedImages, attention, encode_images
from seg4diff_jax.pipeline import Pipeline

Latents = Float[Array, "images latent_rows latent_columns channels"]


class Readout(NamedTuple):
    """Where attention is read: a block, and which of its heads; None is the mean of all of them."""

    block: int
    head: int | None = None


class Forward:
    """A model whose attention is read, readout by readout.

    Images are split over the devices of the model's mesh, if it has one.

    Attributes:
      readouts: all come out of one pass, which ends in the last of their blocks.
    """

    def __init__(self, pipe: Pipeline, readouts: Sequence[Readout]):
        self.pipe, self.readouts = pipe, tuple(readouts)

    def latents(self, pixels: Float[np.ndarray, "images height width 3"]) -> Latents:
        with self.pipe.settings():
            return encode_images(self.pipe.vae, self.pipe.spread(pixels))

    def grid(self, latents: Latents) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        patch = self.pipe.transformer.config.patch_size
        return latents.shape[1] // patch, latents.shape[2] // patch

    def maps(
        self,
        latents: Latents,
        indices: Int[np.ndarray, " images"],
        prompts: TextConditioning,
        image_of_row: Int[np.ndarray, " rows"],
        *,
        step: int,
        seed: int,
    ) -> Float[Array, "readouts rows tokens clip_tokens"]:
        """Attention of image tokens to CLIP's tokens, for rows of prompts; see `attention_maps`.

        Args:
          indices: each image's number in the data set, of which its noise is made.
        """
        pipe = self.pipe
        noise = pipe.spread(image_noise(seed, indices, latents.shape[1:]))
        image_of_row, prompts = pipe.spread((image_of_row, prompts))
        images = NoisedImages(latents, noise, jnp.float32(pipe.schedule.sigma_at(step)), image_of_row)
        with pipe.settings():
            return attention_maps(pipe.transformer, images, prompts, readouts=self.readouts)

    def encoded(self, texts: Sequence[str]) -> TextConditioning:
        """States of the prompts, of which as many are encoded at a time as there are rows: one program serves."""
        return self.pipe.encode_prompts(texts, rows=len(texts))


@partial(jax.jit, static_argnames=("readouts",))
def attention_maps(
    transformer: MMDiT,
    images: NoisedImages,
    texts: TextConditioning,
    *,
    readouts: tuple[Readout, ...],
) -> Float[Array, "readouts rows tokens clip_tokens"]:
    """Attention of every image token to CLIP's tokens, for rows of prompts.

    Args:
      readouts: all come out of one pass, which ends in the last of their blocks.
    """
    mean_heads = all(readout.head is None for readout in readouts)
    options = ForwardOptions(AttentionRequest(scores=False, mean_heads=mean_heads))
    blocks = tuple(dict.fromkeys(readout.block for readout in readouts))
    records = attention(transformer, images, texts, blocks=blocks, options=options)

    def read(readout: Readout) -> Array:
        probs: Array = records[readout.block].probs  # pyright: ignore
        if mean_heads:
            return probs
        return probs.mean(axis=1) if readout.head is None else probs[:, readout.head]

    return jnp.stack([read(readout) for readout in readouts])
