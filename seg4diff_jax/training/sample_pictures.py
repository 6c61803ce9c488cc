"""The same prompts from the same noise at every evaluation: what the model's pictures look like as it learns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from seg4diff_jax.configuration import Refusals
from seg4diff_jax.flow import FlowSchedule, Sampler, check_guidance, image_noise
from seg4diff_jax.models.encoders import Encoders, TokenIds
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.vae import VAE
from seg4diff_jax.passes import encode_prompts, finite_pictures, sample_latents


class Denoiser(nnx.Module):
    """The transformer in training and what makes its inputs, without an autoencoder where latents are cached."""

    def __init__(self, transformer: MMDiT, encoders: Encoders):
        self.transformer, self.encoders = transformer, encoders


@dataclass(frozen=True)
class Samples:
    """Which pictures.

    Attributes:
      count: how many, side by side, of the first validation captions; 0: none.
      steps, guidance: as for `Pipeline.generate`.
      seed: of the noise.
      sampler: as for `Pipeline.generate`: euler also for a checkpoint that was saved with another.
    """

    count: int = 8
    steps: int = 28
    guidance: float = 4.0
    seed: int = 0
    sampler: Sampler | None = None

    def __post_init__(self):
        if found := self.problems():
            raise ValueError("\n".join(found))

    def problems(self) -> list[str]:
        """What does not fit, a sentence each."""
        refusals = Refusals()
        found = refusals.found
        if self.count < 0:
            found.append(f"samples.count is {self.count}; expected at least 1, or 0 for no pictures")
        if self.steps < 1:
            found.append(f"samples.steps is {self.steps}; expected at least 1")
        refusals.check(lambda: check_guidance(self.guidance))
        return found


def asked_for(samples: Samples | None) -> TypeGuard[Samples]:
    return samples is not None and samples.count > 0


def sample_row(
    denoiser: Denoiser, *, vae: VAE, captions: TokenIds, empty: TokenIds, samples: Samples, schedule: FlowSchedule
) -> UInt8[np.ndarray, "height width 3"]:
    """Pictures of the captions, side by side.

    Args:
      denoiser: holds `transformer` and `encoders`, of which T5 is left out, as in masks.
      captions, empty: token ids [captions, 77], and those of the empty prompt [1, 77], which guidance leads away from.
    """
    config = denoiser.transformer.config
    noise = image_noise(
        samples.seed, range(len(captions.clip_l)), (config.sample_size, config.sample_size, config.in_channels)
    )
    sigmas = jnp.asarray(schedule.sigmas(samples.steps), jnp.float32)
    encode = partial(encode_prompts, denoiser.encoders.without_t5(), joint_dim=config.joint_attention_dim)
    guidance = encode(empty), jnp.float32(samples.guidance)
    latents = sample_latents(denoiser.transformer, noise, encode(captions), sigmas, guidance)
    return np.concatenate(finite_pictures(vae, latents), axis=1)
