"""What a reproduction needs: forward passes of the transformer, operations, memory and time."""

from __future__ import annotations

from typing import NamedTuple

from seg4diff_jax.models.flops import mmdit_flops, vae_encoder_flops
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.vae import VAEConfig
from seg4diff_jax.reproduction import components, finetuning
from seg4diff_jax.reproduction.perturbation import WAYS
from seg4diff_jax.reproduction.subject import STEPS

GUIDED_ROWS = 2
"""Rows of a step under guidance."""
SUSTAINED = 0.5
"""Part of the rate of large matrix products that forward passes are taken to reach."""


class Amounts(NamedTuple):
    """How much is measured: see `subject.Subject`. `vocabulary_prompts`: into which the whole vocabulary is split."""

    prompts: int
    images: int
    levels: int
    seeds: int
    vocabulary_prompts: int
    with_adapters: bool
    trains: bool


def forward_passes(depth: int, of: Amounts) -> dict[str, int]:
    """Returns how many rows go through the transformer, by step of the paper."""
    generated = of.prompts * STEPS * GUIDED_ROWS
    perturbed = sum(of.prompts * (depth + 1) * STEPS * (GUIDED_ROWS + (scale is not None)) for scale in WAYS.values())
    scored = 2 * (
        2 * of.images * of.seeds + generated + min(finetuning.LOSS_IMAGES, of.images) * len(finetuning.LOSS_STEPS)
    )
    trained = 3 * finetuning.STEPS_IN_SMALL * finetuning.BATCH_IN_SMALL if of.trains else 0  # forward and backward
    return {
        "attention and value norms": generated,
        "principal components": min(components.IMAGES, of.images),
        "perturbed and guided pictures": perturbed,
        "masks": of.images * of.levels * (1 + of.vocabulary_prompts),
        "segments without names": of.images,
        "MAGNET": scored + trained if of.with_adapters else 0,
    }


def operations(passes: int, images: int, transformer: MMDiTConfig, vae: VAEConfig, side: int, text: int) -> float:
    """Returns the operations of so many forward passes at `side` x `side` pixels, and of encoding the images.

    `text` is the number of text tokens.
    """
    tokens = (side // vae.downsampling // transformer.patch_size) ** 2
    return float(passes) * mmdit_flops(transformer, tokens, text) + images * vae_encoder_flops(vae, side, side)
