"""Runs a model on batches of images for all protocols: encodes images and prompts, and records attention.

Images of a batch are encoded once, and their noise is drawn once for each seed. Encoded prompts are cached. Each noise
level and seed is one pass of the transformer, which records all blocks and heads that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seg4diff_jax.class_grids import NO_TEXT
from seg4diff_jax.class_maps import read_class_scores
from seg4diff_jax.evaluation.batches import PromptRows
from seg4diff_jax.flow import image_noise
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.passes import NoisedImages, Views, attention, encode_images, image_vectors
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.segmentation.class_prior import divided_by_prior
from seg4diff_jax.segmentation.grouping import ImageVectors
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions

Latents = Float[Array, "images latent_rows latent_columns channels"]


class Readout(NamedTuple):
    """Where attention is read: a block and one of its heads; None is the mean of all heads.

    Attributes:
      refined: whether class maps are then fused and refined, as `Forward.masks` says.
    """

    block: int
    head: int | None = None
    refined: bool = False


class Forward:
    """A model whose attention is read. Images are split over the devices of the model's mesh, if it has one.

    Attributes:
      readouts: where attention is read, the refined ones last. One pass reads all others, and stops at the last of
        their blocks; each refined one has a pass of its own.
      masks: how class maps of the refined readouts are fused and refined.
    """

    def __init__(self, pipe: Pipeline, readouts: Sequence[Readout], masks: MaskOptions = PAPERS_MASKS):
        self.pipe, self.masks = pipe, masks
        self.readouts = (*self._refined(readouts, False), *self._refined(readouts, True))
        self._noises: dict[tuple, Float[Array, "images latent_rows latent_columns channels"]] = {}

    @staticmethod
    def _refined(readouts: Sequence[Readout], refined: bool) -> tuple[Readout, ...]:
        return tuple(readout for readout in readouts if readout.refined == refined)

    def by_edges(
        self, scores: Float[Array, "readouts images classes tokens"]
    ) -> list[tuple[Float[Array, "_ images classes tokens"], MaskOptions]]:
        """Splits scores by readouts into those that follow edges and those that do not, each with the options."""
        plain = len(self._refined(self.readouts, False))
        if not self.masks.follow_edges:
            return [(scores, PAPERS_MASKS)]
        each = (scores[:plain], PAPERS_MASKS), (scores[plain:], self.masks)
        return [(some, masks) for some, masks in each if len(some)]

    def latents(self, pixels: Float[np.ndarray, "images height width 3"]) -> Latents:
        with self.pipe.settings():
            return encode_images(self.pipe.vae, self.pipe.spread(pixels))

    def grid(self, latents: Latents) -> tuple[int, int]:
        """Returns the numbers of rows and columns of image tokens."""
        patch = self.pipe.transformer.config.patch_size
        return latents.shape[1] // patch, latents.shape[2] // patch

    def noise(self, latents: Latents, indices: Int[np.ndarray, " images"], seed: int, view: int = 0) -> Latents:
        """Returns the noise of a batch of images, drawn once: all prompts and noise levels of the batch share it."""
        batch = latents.shape, indices.tobytes()
        self._noises = {key: noise for key, noise in self._noises.items() if key[:2] == batch}
        if (*batch, seed, view) not in self._noises:
            self._noises[*batch, seed, view] = self.pipe.spread(image_noise(seed, indices, latents.shape[1:], view))
        return self._noises[*batch, seed, view]

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
        """Returns the attention of image tokens to CLIP's tokens at all readouts that are not refined.

        Of rows of prompts; see `attention_maps`.

        Args:
          indices: each image's number in the data set, which seeds its noise.
          image_of_row: for each row of prompts the place of its image in the batch.
          step: noise level, counted from the clean end of 28.
          seed: seed of the noise.
        """
        pipe, noise = self.pipe, self.noise(latents, indices, seed)
        image_of_row, prompts = pipe.spread((image_of_row, prompts))
        images = NoisedImages(latents, noise, jnp.float32(pipe.schedule.sigma_at(step)), image_of_row)
        with pipe.settings():
            return attention_maps(pipe.transformer, images, prompts, readouts=self._refined(self.readouts, False))

    def vectors(
        self, latents: Latents, indices: Int[np.ndarray, " images"], prompts: TextConditioning, *, step: int, seed: int
    ) -> list[ImageVectors]:
        """Returns the queries and keys of image tokens at all readouts that are not refined.

        Of one prompt for each image; arguments as for `maps`.
        """
        pipe, readouts = self.pipe, self._refined(self.readouts, False)
        noise, sigma = self.noise(latents, indices, seed), jnp.float32(pipe.schedule.sigma_at(step))
        images, blocks = NoisedImages(latents, noise, sigma), tuple(dict.fromkeys(one.block for one in readouts))
        with pipe.settings():
            found = image_vectors(pipe.transformer, images, pipe.spread(prompts), blocks=blocks)
        return [found[one.block].of_head(one.head) for one in readouts]

    def refined_scores(
        self,
        latents: Latents,
        indices: Int[np.ndarray, " images"],
        prompts: TextConditioning,
        asked: PromptRows,
        *,
        step: int,
        seed: int,
    ) -> Float[Array, "refined images classes tokens"]:
        """Returns the class scores of some prompts at the refined readouts, fused over views and refined.

        Args:
          asked: what the prompts ask for; where they are read as concepts, as many for each image, in order.
          others: as for `maps`.
        """
        pipe, masks = self.pipe, self.masks
        as_concepts = masks.reading != "prompt"
        beside = self.encoded([NO_TEXT] * len(latents)) if as_concepts else None
        averaging = divided_by_prior(asked.averaging, asked.prior, masks.prior)
        owner = None if as_concepts else asked.image_of_row
        owner, prompts, averaging, beside = pipe.spread((owner, prompts, averaging, beside))
        noised = lambda view: NoisedImages(
            latents,
            self.noise(latents, indices, seed, view),
            jnp.float32(pipe.schedule.sigma_at(masks.level_of(view, step))),
            owner,
        )
        views = Views(tuple(noised(view) for view in range(masks.views)), masks.mirrors)
        read = partial(read_class_scores, pipe.transformer, views, prompts, averaging, beside, masks=masks)
        with pipe.settings():
            each = [read(block=block, head=head) for block, head, _ in self._refined(self.readouts, True)]
            return jnp.stack([scores.reshape(*scores.shape[:2], -1) for scores in each])

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
