"""A diffusers transformer with PEFT's adapters, and their factors under our names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

from seg4diff_jax.models.lora import (
    Adapter,
    LoRAConfig,
)

MODULES = {
    "image.attention.q": "attn.to_q",
    "image.attention.k": "attn.to_k",
    "image.attention.v": "attn.to_v",
    "image.attention.out": "attn.to_out.0",
    "text.attention.q": "attn.add_q_proj",
    "text.attention.k": "attn.add_k_proj",
    "text.attention.v": "attn.add_v_proj",
    "text.attention.out": "attn.to_add_out",
    "image.dual_attention.q": "attn2.to_q",
    "image.mlp.down": "ff.net.2",
}


def peft_name(layer: str) -> str:
    _, block, target = layer.split(".", 2)
    return f"transformer_blocks.{block}.{MODULES[target]}"


def add_peft_adapters(theirs: SD3Transformer2DModel, config: LoRAConfig, layers: list[str], seed: int = 5) -> None:
    """PEFT's adapters on the same layers, both factors random."""
    modules = [peft_name(layer) for layer in layers]
    theirs.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=modules))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, factor in theirs.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(factor.shape, generator=generator) / factor.shape[1] ** 0.5
                factor.copy_(0.5 * noise)


def factors(
    theirs: SD3Transformer2DModel, layers: list[str], take: Callable[[torch.nn.Parameter], torch.Tensor]
) -> dict[str, Adapter]:
    """What `take` finds in PEFT's factors, under our names and in our layout."""
    modules = dict(theirs.named_modules())
    found = {}
    for layer in layers:
        module = modules[peft_name(layer)]
        found[layer] = Adapter(*(take(getattr(module, f"lora_{x}")["default"].weight).detach().numpy().T for x in "AB"))
    return found
