"""Floating point operations of SD3's parts, 2 for each multiply-add of its matrix products and convolutions.

Norms, activations and softmaxes are left out, as PyTorch's own counter leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

TEXT_TOKENS = 154
"""77 of CLIP, 77 zeros in T5's place."""
TIME_FEATURES = 256


def width(transformer: Mapping[str, Any]) -> int:
    return transformer["num_attention_heads"] * transformer["attention_head_dim"]


def block(image: int, text: int, width: int, *, last: bool = False) -> int:
    """One block for one image; the last one updates no text: it needs of it keys and values (and computes queries)."""
    projections_and_mlp = 24 * image * width**2 + (6 if last else 24) * text * width**2
    modulations = 2 * width * width * (6 + (2 if last else 6))
    return projections_and_mlp + modulations + 4 * (image + text) ** 2 * width


def maps(image: int, text: int, width: int) -> int:
    """What a block's image-to-text attention takes: image queries, all keys, and every score, for the normaliser."""
    return 4 * image * width**2 + 2 * text * width**2 + 2 * image * (image + text) * width + 8 * width**2


def embedding(image: int, text: int, transformer: Mapping[str, Any]) -> int:
    """Patches, context, and what modulates all blocks."""
    w, patch = width(transformer), transformer.get("patch_size", 2) ** 2 * transformer.get("in_channels", 16)
    conditioning = TIME_FEATURES * w + transformer["pooled_projection_dim"] * w + 2 * w * w
    return 2 * (image * patch * w + text * transformer["joint_attention_dim"] * w + conditioning)


def head(image: int, transformer: Mapping[str, Any]) -> int:
    """From image states to the velocity."""
    w, patch = width(transformer), transformer.get("patch_size", 2) ** 2 * transformer.get("in_channels", 16)
    return 2 * (2 * w * w + image * w * patch)


def vae_encoder(vae: Mapping[str, Any], size: int) -> int:
    """Pixels of a square image to the moments of its latents."""
    channels, side = list(vae["block_out_channels"]), size
    convolution = lambda side, inside, out, taps=9: 2 * side**2 * taps * inside * out
    total = convolution(side, 3, channels[0])
    for number, (inside, out) in enumerate(pairwise([channels[0], *channels])):
        for resnet in range(vae["layers_per_block"]):
            first = inside if resnet == 0 else out
            shortcut = convolution(side, first, out, 1) if first != out else 0
            total += convolution(side, first, out) + convolution(side, out, out) + shortcut
        if number < len(channels) - 1:
            side //= 2
            total += convolution(side, out, out)
    deepest, tokens = channels[-1], side**2
    attention = 8 * tokens * deepest**2 + 4 * tokens**2 * deepest
    total += 4 * convolution(side, deepest, deepest) + attention
    return total + convolution(side, deepest, 2 * vae["latent_channels"])


def stages(transformer: Mapping[str, Any], vae: Mapping[str, Any], size: int, block_number: int) -> dict[str, Any]:
    """Operations of one image: `needed` for masks, and those of the `release`, by the stages that are timed."""
    w, depth = width(transformer), transformer["num_layers"]
    image = (size // (2 ** (len(vae["block_out_channels"]) - 1) * transformer.get("patch_size", 2))) ** 2
    one = block(image, TEXT_TOKENS, w)
    encoder, enter = vae_encoder(vae, size), embedding(image, TEXT_TOKENS, transformer)
    after = depth - 1 - block_number
    whole = dict.fromkeys(range(depth), one)
    whole[depth - 1] = block(image, TEXT_TOKENS, w, last=True)
    return {
        "needed": {
            "autoencoder": encoder,
            "blocks before": block_number * one,
            "expert block": enter + maps(image, TEXT_TOKENS, w),
            "blocks after": 0,
            "masks": 0,
        },
        "release": {
            "autoencoder": encoder,
            "blocks before": block_number * one,
            "expert block": enter + whole[block_number],
            "blocks after": sum(whole[depth - 1 - back] for back in range(after)) + head(image, transformer),
            "masks": 0,
        },
    }
