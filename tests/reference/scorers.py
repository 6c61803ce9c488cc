"""Small random models of transformers that score pictures, saved as they are published: in one folder each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from tests.reference.random_weights import randomize_
from tests.reference.small_tokenizers import clip_vocabulary, write_clip_tokenizer

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PROCESSORS = {
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32},
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36}, "crop_size": 28},
}


def save_scorers(root: Path) -> dict[str, Path]:
    """Folders of a CLIP, a DINO (`vit`) and a DINOv2, by name."""
    for name, save in (("clip", save_clip), ("vit", save_vit), ("dinov2", save_dinov2)):
        save(root / name)
    return {name: root / name for name in ("clip", "vit", "dinov2")}


def save_clip(folder: Path) -> CLIPModel:
    """A whole CLIP with its tokenizer and preprocessing."""
    vocabulary = clip_vocabulary()
    config = CLIPConfig(
        text_config=WIDTH | {"vocab_size": len(vocabulary), "intermediate_size": 48, "eos_token_id": 2},
        vision_config=WIDTH | {"image_size": 32, "patch_size": 8, "intermediate_size": 64},
        projection_dim=24,
    )
    model = _saved(CLIPModel(config), folder)
    write_clip_tokenizer(folder, pad_token="<|endoftext|>")
    return model


def save_vit(folder: Path) -> ViTModel:
    return _saved(ViTModel(ViTConfig(**WIDTH, image_size=32, patch_size=8, intermediate_size=64)), folder)


def save_dinov2(folder: Path) -> Dinov2Model:
    return _saved(Dinov2Model(Dinov2Config(**WIDTH, image_size=70, patch_size=14)), folder)


def _saved(model: Any, folder: Path) -> Any:
    randomize_(model)
    if hasattr(model, "embeddings"):
        with torch.no_grad():
            model.embeddings.position_embeddings.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[model.config.model_type]))
    return model
