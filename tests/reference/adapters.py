"""Small random adapters as tensors and as the release's file."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

RANK, WIDTH, BLOCKS = 3, 64, 6
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PREFIX = "backbone.transformer."
SUFFIX = {"native": ".safetensors", "diffusers": ".safetensors", "peft": "", "release": ".pth"}


def factors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random A and B of every block's image attention, under diffusers' own names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block, module in itertools.product(range(BLOCKS), TARGETS):
        for side, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK))):
            noise = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            tensors[f"transformer_blocks.{block}.attn.{module}.lora_{side}.weight"] = (0.5 * noise).to(dtype)
    return tensors


def mask_head(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    channels = {0: (64, 1), 2: (64, 64), 4: (1, 64)}
    head = {f"attn_mlp.attn_score_layer.{i}.weight": torch.randn(*shape, 3, 3) for i, shape in channels.items()}
    head |= {f"attn_mlp.attn_score_layer.{i}.bias": torch.randn(shape[0]) for i, shape in channels.items()}
    return {name: tensor.to(dtype) for name, tensor in head.items()}


def release_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {PREFIX + name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}


def write_release(path: Path, tensors: dict, **beside) -> Path:
    torch.save({"model": tensors, **beside}, path)
    return path
