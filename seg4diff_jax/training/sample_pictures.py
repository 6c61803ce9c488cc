"""Generates images of the same prompts from the same noise at every evaluation, to show how the model learns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from seg4diff_jax.checked import Checked
from seg4diff_jax.configuration import Refusals
from seg4diff_jax.flow import FlowSchedule, Sampler, check_guidance, image_noise
from seg4diff_jax.models.encoders import Encoders, TokenIds
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.vae import VAE
from seg4diff_jax.passes import encode_prompts, finite_pictures
from seg4diff_jax.sampling import GeneratingRun, sample_latents


class Denoiser(nnx.Module):
    """The transformer in training and its encoders; without an autoencoder where latents are cached."""

    def __init__(self, transformer: MMDiT, encoders: Encoders):
        self.transformer, self.encoders = transformer, encoders


@dataclass(frozen=True)
class Samples(Checked):
    """Which images to generate at each evaluation.

    Attributes:
      count: number of images, side by side, one for each of the first validation captions; 0: none.
      steps: number of sampling steps, as for `Pipeline.generate`.
      guidance: guidance scale, as for `Pipeline.generate`.
      seed: seed of the noise.
      sampler: as for `Pipeline.generate`; euler even if the checkpoint was saved with another sampler.
    """

    count: int = 8
    steps: int = 28
    guidance: float = 4.0
    seed: int = 0
    sampler: Sampler | None = None

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
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
    """Generates images of the captions, side by side.

    Args:
      denoiser: the transformer and its encoders; T5 is not used, as for masks.
      captions: token ids of the captions [captions, 77].
      empty: token ids of the empty prompt [1, 77], for classifier-free guidance.
    """
    config = denoiser.transformer.config
    noise = image_noise(
        samples.seed, range(len(captions.clip_l)), (config.sample_size, config.sample_size, config.in_channels)
    )
    sigmas = jnp.asarray(schedule.sigmas(samples.steps), jnp.float32)
    encode = partial(encode_prompts, denoiser.encoders.without_t5(), joint_dim=config.joint_attention_dim)
    guidance = encode(empty), jnp.float32(samples.guidance)
    latents = sample_latents(denoiser.transformer, GeneratingRun(noise, encode(captions), sigmas, guidance))
    return np.concatenate(finite_pictures(vae, latents), axis=1)
