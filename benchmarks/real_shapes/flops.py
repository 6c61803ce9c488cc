"""Operations per image of each stage that is timed, from `seg4diff_jax.models.flops`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seg4diff_jax.models.flops import block_flops, embedding_flops, head_flops, maps_flops, vae_encoder_flops
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.vae import VAEConfig

TEXT_TOKENS = 154
"""77 of CLIP, 77 zeros in T5's place."""


def stages(transformer: Mapping[str, Any], vae: Mapping[str, Any], size: int, block: int) -> dict[str, dict[str, int]]:
    """Operations that masks need (`needed`), and those of the `release`, on a square image of `size` pixels."""
    config, encoder = MMDiTConfig.from_json(dict(transformer)), VAEConfig.from_json(dict(vae))
    image = (size // (encoder.downsampling * config.patch_size)) ** 2
    blocks = [block_flops(config, number, image, TEXT_TOKENS) for number in range(config.num_layers)]
    common = {"autoencoder": vae_encoder_flops(encoder, size, size), "blocks before": sum(blocks[:block])}
    enter = embedding_flops(config, image, TEXT_TOKENS)
    needed = {"expert block": enter + maps_flops(config, image, TEXT_TOKENS), "blocks after": 0, "masks": 0}
    after = sum(blocks[block + 1 :]) + head_flops(config, image)
    release = {"expert block": enter + blocks[block], "blocks after": after, "masks": 0}
    return {"needed": common | needed, "release": common | release}
