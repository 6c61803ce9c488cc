"""Models that score pictures, as transformers saves them, and how pictures are prepared for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from seg4diff_jax.analysis import preprocessing
from seg4diff_jax.convert.assemble import abstract
from seg4diff_jax.convert.sources.transformers_folder import load_dino_model, load_image_encoder, load_whole_clip
from seg4diff_jax.convert.tables import clip, clip_vision, dino
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.clip_vision import CLIPVision, CLIPVisionConfig
from seg4diff_jax.models.dino import DINO, DINOConfig
from tests.fuzz.inputs.weights import CLIP, MEANT, tensors_of_model, write
from tests.fuzz.reader import Reader

VISION = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 8,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 4,
}

SELF_SUPERVISED = {name: value for name, value in VISION.items() if name != "projection_dim"}
SELF_SUPERVISED |= {"model_type": "vit", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True}
PREPROCESSING = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "do_center_crop": True,
    "size": {"shortest_edge": 8},
    "crop_size": {"height": 8, "width": 8},
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.25, 0.5, 0.75],
}


def vision_tensors() -> dict[str, np.ndarray]:
    config = CLIPVisionConfig.from_json(VISION)
    return tensors_of_model(abstract(lambda rngs: CLIPVision(config, rngs=rngs)), clip_vision.diffusers(config))


def make_image_encoder(root: Path) -> None:
    write(root / "model.safetensors", vision_tensors())
    (root / "config.json").write_text(json.dumps(VISION, indent=2))


def make_whole_clip(root: Path) -> None:
    config = CLIPTextConfig.from_json(CLIP | {"projection_dim": VISION["projection_dim"]})
    text = tensors_of_model(abstract(lambda rngs: CLIPText(config, rngs=rngs)), clip.diffusers(config))
    write(root / "model.safetensors", text | vision_tensors() | {"logit_scale": np.float32(2).reshape(())})
    towers = {"text_config": CLIP, "vision_config": VISION}
    described = {"model_type": "clip", "projection_dim": VISION["projection_dim"], **towers}
    (root / "config.json").write_text(json.dumps(described, indent=2))


def dino_tensors() -> dict[str, np.ndarray]:
    config = DINOConfig.from_json(SELF_SUPERVISED)
    return tensors_of_model(abstract(lambda rngs: DINO(config, rngs=rngs)), dino.transformers(config))


def make_dino(root: Path) -> None:
    write(root / "model.safetensors", dino_tensors())
    (root / "config.json").write_text(json.dumps(SELF_SUPERVISED, indent=2))


def make_pickled_dino(root: Path) -> None:
    import torch

    torch.save(
        {name: torch.from_numpy(each.copy()) for name, each in dino_tensors().items()}, root / "pytorch_model.bin"
    )
    (root / "config.json").write_text(json.dumps(SELF_SUPERVISED, indent=2))


def make_preprocessing(root: Path) -> None:
    (root / preprocessing.FILE).write_text(json.dumps(PREPROCESSING, indent=2))


def reads(load: Callable[..., Any]) -> Callable[[Path], Any]:
    def read(root: Path) -> Any:
        loaded = load(root, dtype=np.float32)
        models = loaded if isinstance(loaded, tuple) else (loaded,)
        return [(jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(each))), each.config) for each in models]

    return read


def read_preprocessing(root: Path) -> Any:
    return vars(preprocessing.read_preprocessing(root, preprocessing.DINOV2))


FOLDER = {"config.json": "json", "*.safetensors": "safetensors"}
OF_TOWERS = {
    r"config.json: \w+: (text|vision)_config\.(eos_token_id|layer_norm_eps|hidden_act)\b": "other values are sound",
    r"config.json: deleted: (text|vision)_config\.num_attention_heads\b": "transformers has a default, which fits here",
}
LOADER = ("convert/sources/transformers_folder.py",)

READERS: dict[str, Reader] = {
    "image encoder": Reader(make_image_encoder, reads(load_image_encoder), LOADER, FOLDER, MEANT, cases=10),
    "whole clip": Reader(make_whole_clip, reads(load_whole_clip), LOADER, FOLDER, OF_TOWERS, cases=14),
    "dino": Reader(make_dino, reads(load_dino_model), LOADER, FOLDER, MEANT, cases=10),
    "pickled dino": Reader(
        make_pickled_dino, reads(load_dino_model), LOADER, {"config.json": "json", "*.bin": "zip"}, MEANT, cases=12
    ),
    "preprocessing": Reader(
        make_preprocessing,
        read_preprocessing,
        ("seg4diff_jax/analysis/preprocessing.py",),
        {preprocessing.FILE: "json"},
        {": ": "other values are sound, and absent ones have a default"},
        cases=16,
    ),
}
