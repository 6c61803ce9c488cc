"""The passes of a model, as pure jitted functions. Everything that runs a model calls these.

    pixels    -> encode_images  -> latents        -> NoisedImages -> attention -> class scores
    token ids -> encode_prompts -> conditioning                   -> velocity
    latents   -> decode_pictures

`attention` stops at the last block that is read. `velocity` runs all blocks, and can return attention as well. From
noise to latents: `sampling`; from attention to class scores: `class_maps`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from seg4diff_jax.flow import FlowSchedule, add_noise
from seg4diff_jax.models.attention import (
    DEFAULT_OPTIONS,
    AttentionRequest,
    ForwardOptions,
    JointAttention,
)
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.encoders import Encoders, TokenIds, join_states
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.trunk import attentions_at
from seg4diff_jax.models.vae import VAE
from seg4diff_jax.parallel import on_host
from seg4diff_jax.segmentation.grouping import ImageVectors

MEAN_PROBS = AttentionRequest(scores=False, mean_heads=True)
"""The maps that masks are made of: image-to-text probabilities of CLIP's tokens, averaged over heads."""


# ---- to what the transformer reads ----------------------------------------------------------------------------------


@jax.jit
def encode_images(
    vae: VAE, pixels: Float[Array, "images height width 3"] | UInt8[Array, "images height width 3"] | np.ndarray
) -> Float[Array, "images rows columns channels"]:
    """Encodes pixels as clean latents, fp32. Pixels are floats in -1..1, or uint8 in 0..255."""
    return vae.encode(to_model_range(pixels)).astype(jnp.float32)


def to_model_range(pixels: Any) -> Float[Array, "*shape"]:
    """Brings uint8 pixels from 0..255 to -1..1, on the device. Floats are in -1..1 already, and stay as they are."""
    return pixels.astype(jnp.float32) / 127.5 - 1 if pixels.dtype == jnp.uint8 else pixels


@partial(jax.jit, static_argnames=("joint_dim", "t5_length"))
def encode_prompts(
    encoders: Encoders, ids: TokenIds, *, joint_dim: int, t5_length: int | None = None
) -> TextConditioning:
    """Encodes token ids as the transformer's context [batch, tokens, joint_dim] and pooled vector.

    The penultimate states of the two CLIPs are concatenated on the feature axis and zero-padded to `joint_dim`. T5's
    states follow on the token axis. The pooled vector is CLIP-L's projection, then bigG's. Without T5, zeros replace
    its states. The zeros still take part in attention; one token stands for them all.

    Args:
      joint_dim: the transformer's `joint_attention_dim`.
      t5_length: the number of zero tokens without T5; default: as many as a CLIP prompt has, as in the released
        Seg4Diff (diffusers: `max_sequence_length`). With T5 it is not used: the ids give the length.

    Raises:
      ValueError: ids and encoders do not belong together, or the states do not fit in `joint_dim`.
    """
    if (encoders.t5 is None) != (ids.t5 is None):
        found = "T5's ids without its encoder" if encoders.t5 is None else "T5's encoder without its ids"
        raise ValueError(f"expected T5's encoder and its ids, or neither, found {found}")
    t5_states = None if encoders.t5 is None else encoders.t5(jnp.asarray(ids.t5))
    states_l, states_g = encoders.clip_l(jnp.asarray(ids.clip_l)), encoders.clip_g(jnp.asarray(ids.clip_g))
    return join_states(states_l, states_g, t5_states, joint_dim=joint_dim, t5_length=t5_length)


@jax.jit
def each_prompt(texts: TextConditioning) -> list[TextConditioning]:
    """Splits a batch of conditionings into one for each prompt, so that each can be kept by itself."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], texts) for i in range(len(texts.pooled))]


@jax.jit
def stacked_prompts(texts: list[TextConditioning]) -> TextConditioning:
    """Stacks the conditionings of single prompts into a batch: the inverse of `each_prompt`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *texts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoisedImages:
    """A pytree of images at a noise level. Each image has one prompt or several.

    Attributes:
      latents: clean latents, fp32 [images, rows, columns, channels].
      noise: standard normal, of the same shape as the latents.
      sigma: noise level, 0 (clean) to 1 (noise): one for all images, or one for each.
      image_of_prompt: for each row of the text, the index of its image; None: each image has one row, in order.
    """

    latents: Float[Array, "images rows columns channels"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    noise: Float[Array, "images rows columns channels"] | Any
    sigma: Float[Array, "*images"] | Any
    image_of_prompt: Int[Array, " prompts"] | Any | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def inputs(self) -> tuple[Float[Array, "prompts rows columns channels"], Float[Array, " prompts"]]:
        """Returns noisy latents and timesteps for each row of the text."""
        noisy = add_noise(self.latents, self.noise, self.sigma)
        timesteps = jnp.broadcast_to(FlowSchedule.num_train_timesteps * jnp.float32(self.sigma), (len(noisy),))
        if self.image_of_prompt is None:
            return noisy, timesteps
        return noisy[self.image_of_prompt], timesteps[self.image_of_prompt]

    def grid(self, patch: int) -> tuple[int, int]:
        """Returns the rows and columns of image tokens. `patch` is the side of a token's patch, in latent positions."""
        return self.latents.shape[1] // patch, self.latents.shape[2] // patch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Views:
    """A pytree of one batch of images, noised several times, some of them mirrored.

    Attributes:
      each: the images under the noise, and at the noise level, of each view.
      mirrored: whether each view is of mirrored latents. Static; empty: none is.
    """

    each: tuple[NoisedImages, ...] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    mirrored: tuple[bool, ...] = field(default=(), metadata={"static": True})

    def as_one(self) -> NoisedImages:
        """Returns all views as one batch: the views of an image, and those of a prompt, follow one another."""
        flips = self.mirrored or (False,) * len(self.each)
        latents = [one.latents[:, :, ::-1] if flip else one.latents for one, flip in zip(self.each, flips, strict=True)]
        count, images = len(self.each), len(self.each[0])
        together = lambda arrays: jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
        sigmas = [jnp.broadcast_to(jnp.asarray(one.sigma), (images,)) for one in self.each]
        owner = self.each[0].image_of_prompt
        if owner is not None:
            owner = (owner[:, None] * count + jnp.arange(count)).reshape(-1)
        return NoisedImages(together(latents), together([one.noise for one in self.each]), together(sigmas), owner)

    def mirrored_back(
        self, maps: Float[Array, "prompts views classes rows columns"]
    ) -> Float[Array, "prompts views classes rows columns"]:
        """Mirrors the maps of the mirrored views."""
        if not any(self.mirrored):
            return maps
        return jnp.where(jnp.array(self.mirrored)[:, None, None, None], maps[..., ::-1], maps)


# ---- through the transformer ----------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("blocks", "options"))
def attention(
    transformer: MMDiT,
    images: NoisedImages,
    texts: TextConditioning,
    *,
    blocks: tuple[int, ...],
    options: ForwardOptions = DEFAULT_OPTIONS,
) -> dict[int, JointAttention]:
    """Returns the joint attention of `blocks`, by block number, from one pass that stops at the last of them.

    Raises as `trunk.attentions_at` does.
    """
    latents, timesteps = images.inputs()
    return attentions_at(transformer, latents, timesteps, texts, blocks=blocks, options=options)


@partial(jax.jit, static_argnames=("capture", "options"))
def velocity(
    transformer: MMDiT,
    images: NoisedImages,
    texts: TextConditioning,
    *,
    capture: tuple[int, ...] = (),
    options: ForwardOptions = DEFAULT_OPTIONS,
) -> tuple[Float[Array, "prompts rows columns channels"], dict[int, JointAttention]]:
    """Returns the velocity, and the joint attention of the blocks in `capture`. Raises as `MMDiT.__call__` does."""
    latents, timesteps = images.inputs()
    return transformer(latents, timesteps, texts, capture=capture, options=options)


def text_maps(
    transformer: MMDiT, images: NoisedImages, texts: TextConditioning, *, block: int, kernel: Kernel | None = None
) -> Float[Array, "prompts image_tokens text_tokens"]:
    """Returns the image-to-text probabilities of CLIP's tokens in one block, averaged over heads."""
    record = attention(transformer, images, texts, blocks=(block,), options=ForwardOptions(MEAN_PROBS, kernel))[block]
    assert record.probs is not None
    return record.probs


@partial(jax.jit, static_argnames=("blocks", "kernel"))
def image_vectors(
    transformer: MMDiT,
    images: NoisedImages,
    texts: TextConditioning,
    *,
    blocks: tuple[int, ...],
    kernel: Kernel | None = None,
) -> dict[int, ImageVectors]:
    """Returns the queries and keys of image tokens, by block number, from one pass."""
    options = ForwardOptions(AttentionRequest((), scores=False, probs=False, qkv=True), kernel)
    records = attention(transformer, images, texts, blocks=blocks, options=options)
    rows, columns = images.grid(transformer.config.patch_size)
    own = lambda vectors: vectors[:, : rows * columns]
    return {block: ImageVectors(own(record.q), own(record.k)) for block, record in records.items()}


# ---- from latents to pictures ---------------------------------------------------------------------------------------


@jax.jit
def decode_pictures(
    vae: VAE, latents: Float[Array, "images rows columns channels"]
) -> tuple[UInt8[Array, "images height width 3"], Bool[Array, ""]]:
    """Decodes latents to pixels in 0..255, rounded. Also returns whether all pixels were finite."""
    pixels = vae.decode(latents).astype(jnp.float32)
    levels = jnp.round(255 * jnp.clip(pixels / 2 + 0.5, 0, 1))
    return levels.astype(jnp.uint8), jnp.isfinite(pixels).all()


def finite_pictures(
    vae: VAE, latents: Float[Array, "images rows columns channels"]
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Decodes latents to pictures on the host. Raises FloatingPointError for pixels that are not finite."""
    pictures, finite = map(on_host, decode_pictures(vae, latents))
    if not finite:
        raise FloatingPointError("the picture's pixels are not finite: the weights are damaged")
    return list(pictures)
