"""Bounds of the numbers in tasks' configurations, for dataclasses that do not check these numbers themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from seg4diff_jax.convert.configurations import POSITIVE, Bounds, wrong_values
from seg4diff_jax.flow import LARGEST_SEED
from seg4diff_jax.magnet.task import MagnetConfig
from seg4diff_jax.miniature.autoencoder import AutoencoderConfig
from seg4diff_jax.miniature.autoencoder import Objective as AutoencoderObjective
from seg4diff_jax.miniature.contrastive import ContrastiveConfig
from seg4diff_jax.miniature.flow_matching import Evaluation, FlowMatchingConfig
from seg4diff_jax.miniature.flow_matching import Objective as FlowObjective
from seg4diff_jax.miniature.scenes import SceneConfig
from seg4diff_jax.models.clip import CLIPTextConfig
from seg4diff_jax.models.clip_vision import CLIPVisionConfig
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.lora import LoRAConfig
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.vae import VAEConfig
from seg4diff_jax.parallel import MeshConfig
from seg4diff_jax.training.loop import RunConfig
from seg4diff_jax.training.sample_pictures import Samples

WEIGHT, SHARE, COUNT = Bounds(0, math.inf), Bounds(0, 1), Bounds(1, 2**40)
SEED, MEAN = Bounds(0, LARGEST_SEED), Bounds(-100, 100)
ARCHITECTURES = (MMDiTConfig, VAEConfig, CLIPTextConfig, CLIPVisionConfig)
"""Configurations of models. Their values have the same bounds as in checkpoints."""
NUMBERS: dict[type, dict[str, Bounds]] = {
    RunConfig: {"seed": SEED, "steps": COUNT, "workers": Bounds(0, 4096)},
    MeshConfig: {"data": COUNT, "fsdp": COUNT, "tensor": COUNT},
    Samples: {"steps": Bounds(1, 1000), "guidance": Bounds(-1000, 1000), "seed": SEED},
    SceneConfig: {"size": COUNT, "train": COUNT, "validation": COUNT},
    AutoencoderObjective: {"edges": WEIGHT, "divergence": WEIGHT, "distances": WEIGHT},
    AutoencoderConfig: {"measured": COUNT},
    ContrastiveConfig: {"position_size": WEIGHT},
    FlowObjective: {
        "mean": MEAN,
        "std": POSITIVE,
        "shift": POSITIVE,
        "image_tokens": COUNT,
        "caption_dropout": SHARE,
        "pooled_dropout": SHARE,
    },
    Evaluation: {"sigmas": SHARE, "batch_size": COUNT},
    FlowMatchingConfig: {"inference_shift": POSITIVE},
    MagnetConfig: {"block": Bounds(0, 999)},
    LoRAConfig: {"alpha": POSITIVE, "blocks": Bounds(0, 999)},
    Kernel: {"query_chunk": COUNT},
}


def out_of_bounds(config: Any, prefix: str = "") -> list[str]:
    """Returns a sentence for each number in a task's configuration, at any depth, that is out of bounds."""
    if isinstance(config, ARCHITECTURES):
        return [f"{prefix}{each}" for each in wrong_values(type(config), asdict(config))]
    bounds, found = NUMBERS.get(type(config), {}), []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found += out_of_bounds(value, f"{prefix}{field.name}.")
        elif value is not None and field.name in bounds:
            several = value.values() if isinstance(value, Mapping) else value
            if any(each not in bounds[field.name] for each in (several if _is_several(value) else (value,))):
                found.append(f"{prefix}{field.name} is {value!r}; expected {bounds[field.name]}")
    return found


def _is_several(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)
