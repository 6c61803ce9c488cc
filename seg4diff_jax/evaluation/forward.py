"""One model's passes over batches of images, which all protocols read: images and prompts encoded, attention recorded.

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

from seg4diff_jax.flow import add_noise, image_noise
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions
from seg4diff_jax.models.clip import CLIPText
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.t5 import T5Encoder
from seg4diff_jax.models.trunk import attentions_at
from seg4diff_jax.models.vae import VAE
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.text import TokenIds, encode_prompts, tokenize

REMEMBERED = 256
"""Prompts whose encoding is kept, about 2.5 MB each at SD3's sizes in fp32."""

Latents = Float[Array, "images latent_rows latent_columns channels"]


class Place(NamedTuple):
    """Where attention is read: a block, and which of its heads; None is the mean of all of them."""

    block: int
    head: int | None = None


class Forward:
    """A model whose attention is read, place by place.

    Images are split over the devices of the model's mesh, if it has one.

    Attributes:
      places: all come out of one pass, which ends in the last of their blocks.
    """

    def __init__(self, pipe: Pipeline, places: Sequence[Place]):
        self.pipe, self.places = pipe, tuple(places)
        self._texts: dict[str, TextConditioning] = {}

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
    ) -> Float[Array, "places rows tokens clip_tokens"]:
        """Attention of image tokens to CLIP's tokens, for rows of prompts; see `attention_maps`.

        Args:
          indices: each image's number in the data set, of which its noise is made.
        """
        pipe = self.pipe
        height, width, channels = latents.shape[1:]
        noise = pipe.spread(image_noise(seed, indices, (height, width, channels)))
        image_of_row, prompts = pipe.spread((image_of_row, prompts))
        with pipe.settings():
            return attention_maps(
                pipe.transformer,
                (latents, noise, image_of_row),
                prompts,
                jnp.float32(pipe.schedule.sigma_at(step)),
                places=self.places,
            )

    def encoded(self, texts: Sequence[str]) -> TextConditioning:
        """States of the prompts, of which those not yet known are encoded, as many at a time as there are rows."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        with self.pipe.settings():
            if new:
                filled = [*new, *new[-1:] * (len(texts) - len(new))]
                pipe = self.pipe
                joint_dim = pipe.transformer.config.joint_attention_dim
                ids = tokenize(pipe.tokenizers, filled)
                encoded = encode_texts(pipe.clip_l, pipe.clip_g, pipe.t5, ids, joint_dim=joint_dim)
                self._texts |= zip(new, encoded, strict=False)
            chosen = [self._texts[text] for text in texts]
            for text in list(self._texts)[: -max(REMEMBERED, len(texts))]:
                del self._texts[text]
            return stack_texts(chosen)


# ---- compiled programs ----------------------------------------------------------------------------------------------


@jax.jit
def encode_images(vae: VAE, pixels: Float[Array, "images height width 3"]) -> Latents:
    """Clean latents, fp32."""
    return vae.encode(pixels).astype(jnp.float32)


@partial(jax.jit, static_argnames=("joint_dim",))
def encode_texts(
    clip_l: CLIPText, clip_g: CLIPText, t5: T5Encoder | None, ids: TokenIds, joint_dim: int
) -> list[TextConditioning]:
    """Each prompt's states by themselves, to be kept."""
    encoded = encode_prompts(clip_l, clip_g, t5, ids, joint_dim=joint_dim)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], encoded) for i in range(len(encoded.pooled))]


@jax.jit
def stack_texts(texts: list[TextConditioning]) -> TextConditioning:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *texts)


@partial(jax.jit, static_argnames=("places",))
def attention_maps(
    transformer: MMDiT,
    images: tuple[Float[Array, "images r c ch"], Float[Array, "images r c ch"], Int[Array, " rows"]],
    texts: TextConditioning,
    sigma: Float[Array, ""],
    *,
    places: tuple[Place, ...],
) -> Float[Array, "places rows tokens clip_tokens"]:
    """Attention of every image token to CLIP's tokens, for rows of prompts.

    Args:
      images: clean latents, noise, and which image each row is about.
      places: all come out of one pass, which ends in the last of their blocks.
    """
    latents, noise, image_of_row = images
    noisy = add_noise(latents, noise, sigma)[image_of_row]
    timesteps = jnp.full(len(noisy), 1000 * sigma, jnp.float32)
    mean_heads = all(place.head is None for place in places)
    request = AttentionRequest(scores=False, mean_heads=mean_heads)
    blocks = tuple(dict.fromkeys(place.block for place in places))
    records = attentions_at(transformer, noisy, timesteps, texts, blocks=blocks, options=ForwardOptions(request))

    def read(place: Place) -> Array:
        probs: Array = records[place.block].probs  # pyright: ignore
        if mean_heads:
            return probs
        return probs.mean(axis=1) if place.head is None else probs[:, place.head]

    return jnp.stack([read(place) for place in places])
