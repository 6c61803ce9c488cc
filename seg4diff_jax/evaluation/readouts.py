"""Runs a model on batches of images for all protocols: encodes images and prompts, and records attention.

Images of a batch are encoded once, and their noise is drawn once for each seed. Encoded prompts are cached. Each noise
level and seed is one pass of the transformer, which records all blocks and heads that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

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
    """Where attention is read: a block and one of its heads; None is the mean of all heads."""

    block: int
    head: int | None = None


class Forward:
    """A model whose attention is read. Images are split over the devices of the model's mesh, if it has one.

    Attributes:
      readouts: where attention is read. One pass reads all of them, and stops at the last of their blocks.
    """

    def __init__(self, pipe: Pipeline, readouts: Sequence[Readout]):
        self.pipe, self.readouts = pipe, tuple(readouts)
        self._drawn: tuple[Any, Latents] | None = None

    def latents(self, pixels: Float[np.ndarray, "images height width 3"]) -> Latents:
        with self.pipe.settings():
            return encode_images(self.pipe.vae, self.pipe.spread(pixels))

    def grid(self, latents: Latents) -> tuple[int, int]:
        """Returns the numbers of rows and columns of image tokens."""
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
        """Returns the attention of image tokens to CLIP's tokens, for rows of prompts; see `attention_maps`.

        Args:
          indices: each image's number in the data set, which seeds its noise.
          image_of_row: for each row of prompts the place of its image in the batch.
          step: noise level, counted from the clean end of 28.
          seed: seed of the noise.
        """
        pipe = self.pipe
        noise = self._noise(seed, indices, latents.shape[1:])
        image_of_row, prompts = pipe.spread((image_of_row, prompts))
        images = NoisedImages(latents, noise, jnp.float32(pipe.schedule.sigma_at(step)), image_of_row)
        with pipe.settings():
            return attention_maps(pipe.transformer, images, prompts, readouts=self.readouts)

    def _noise(self, seed: int, indices: Int[np.ndarray, " images"], shape: tuple[int, ...]) -> Latents:
        """Draws a batch's noise once for all of its prompts and noise levels, which follow one another."""
        asked = seed, tuple(indices.tolist()), shape
        if self._drawn is None or self._drawn[0] != asked:
            self._drawn = asked, self.pipe.spread(image_noise(seed, indices, shape))
        return self._drawn[1]

    def encoded(self, texts: Sequence[str]) -> TextConditioning:
        """Encodes prompts. Always encodes `len(texts)` rows at a time, so that one compiled program is enough."""
        return self.pipe.encode_prompts(texts, rows=len(texts))


@partial(jax.jit, static_argnames=("readouts",))
def attention_maps(
    transformer: MMDiT,
    images: NoisedImages,
    texts: TextConditioning,
    *,
    readouts: tuple[Readout, ...],
) -> Float[Array, "readouts rows tokens clip_tokens"]:
    """Returns the attention of every image token to CLIP's tokens, for rows of prompts.

    Args:
      readouts: where attention is read. One pass reads all of them, and stops at the last of their blocks.
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
