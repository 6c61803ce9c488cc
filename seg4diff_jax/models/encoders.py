"""SD3's encoders, which turn pictures and prompts into the transformer's inputs: VAE, two CLIPs and optionally T5."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from seg4diff_jax.models.clip import CLIPText, CLIPTextOutput
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.t5 import T5Encoder
from seg4diff_jax.models.vae import VAE


class Encoders(nnx.Module):
    """The models that run before the transformer, and the VAE's decoder, which runs after it.

    Args:
      vae: None if latents are given, as in training from a cache.
      t5: None puts zeros in place of its states, as the released Seg4Diff does.
    """

    def __init__(self, vae: VAE | None, clip_l: CLIPText, clip_g: CLIPText, t5: T5Encoder | None = None):
        self.vae, self.clip_l, self.clip_g, self.t5 = vae, clip_l, clip_g, t5

    @property
    def parts(self) -> tuple[nnx.Module, ...]:
        """The models that are present, in the order VAE, CLIP-L, CLIP-bigG, T5."""
        return tuple(part for part in (self.vae, self.clip_l, self.clip_g, self.t5) if part is not None)

    def without_t5(self) -> Encoders:
        """Returns the same models without T5, which masks and the pictures of small runs do not need."""
        return Encoders(self.vae, self.clip_l, self.clip_g)


class TokenIds(NamedTuple):
    """Token ids for each text encoder, int32 [batch, tokens]. T5's may be longer or shorter than the CLIPs'."""

    clip_l: Int[Array | np.ndarray, "batch tokens"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    clip_g: Int[Array | np.ndarray, "batch tokens"] | Any
    t5: Int[Array | np.ndarray, "batch t5_tokens"] | Any | None = None


def join_states(
    states_l: CLIPTextOutput,
    states_g: CLIPTextOutput,
    t5_states: Float[Array, "batch t5_tokens width"] | None,
    *,
    joint_dim: int,
    t5_length: int | None = None,
) -> TextConditioning:
    """Joins the states of the text encoders to the transformer's conditioning (see `passes.encode_prompts`).

    Args:
      t5_states: T5's states; None puts zeros in their place.
      joint_dim, t5_length: as for `passes.encode_prompts`.

    Raises:
      ValueError: the states do not fit in `joint_dim`.
    """
    clip_states = jnp.concatenate([states_l.penultimate, states_g.penultimate], axis=-1)
    batch, tokens, width = clip_states.shape
    if width > joint_dim:
        raise ValueError(f"the two CLIPs' states are {width} wide together: expected at most {joint_dim=}")
    zeros = 0
    if t5_states is None:
        zeros = tokens if t5_length is None else t5_length
        t5_states = jnp.zeros((batch, min(zeros, 1), joint_dim), clip_states.dtype)
    elif t5_states.shape[-1] != joint_dim:
        raise ValueError(f"T5's states are {t5_states.shape[-1]} wide: expected {joint_dim=}")
    clip_states = jnp.pad(clip_states, ((0, 0), (0, 0), (0, joint_dim - width)))
    context = jnp.concatenate([clip_states, t5_states], axis=1)
    pooled = jnp.concatenate([states_l.pooled, states_g.pooled], axis=-1)
    return TextConditioning(context, pooled, max(1, zeros), segments(tokens, zeros or t5_states.shape[1]))


def segments(clip: int, t5: int) -> tuple[tuple[str, int], ...]:
    """Returns name and length of each part of SD3's text: CLIP's tokens, then T5's (or the zeros) if there are any."""
    return (("clip", clip), ("t5", t5)) if t5 else (("clip", clip),)
