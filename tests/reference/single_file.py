"""A small checkpoint as Stability publishes them, one safetensors file, beside the same weights for diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from seg4diff_jax.convert.components import COMPONENTS, parse_config
from seg4diff_jax.convert.names import assign_back
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.convert.sources.safetensors_stream import write_safetensors
from tests.reference.checkpoints import make_checkpoint, make_t5
from tests.reference.random_weights import randomize_
from tests.reference.small_tokenizers import clip_vocabulary

HEAD_DIM = 64
"""What a single file leaves unsaid and every published one has."""


def make_both(directory: Path, *, dual: bool, dtype: torch.dtype = torch.float16) -> tuple[Path, Path]:
    """Write `directory/diffusers` and `directory/single.safetensors`. `dual`: like SD3.5-medium, else like SD3."""
    layout = make_checkpoint(directory / "diffusers", dtype=dtype)
    modules = {
        "transformer": SD3Transformer2DModel(
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=HEAD_DIM,
            caption_projection_dim=2 * HEAD_DIM,
            joint_attention_dim=3 * HEAD_DIM,
            pooled_projection_dim=3 * HEAD_DIM,
            pos_embed_max_size=12,
            dual_attention_layers=(0, 1) if dual else (),
            qk_norm="rms_norm" if dual else None,
        ),
        "vae": AutoencoderKL(
            sample_size=1024,
            block_out_channels=(32, 64, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": _clip(heads=1, activation="quick_gelu"),
        "text_encoder_2": _clip(heads=2, activation="gelu"),
        "text_encoder_3": make_t5(3 * HEAD_DIM),
    }
    for number, (name, module) in enumerate(modules.items()):
        randomize_(module, number)
        if name == "text_encoder":
            torch.nn.init.eye_(module.text_projection.weight)  # published files leave it out for this reason
        shutil.rmtree(layout / name)
        module.to(dtype).save_pretrained(layout / name)
    return layout, write_single_file(layout, directory / "single.safetensors")


def _clip(*, heads: int, activation: str) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(clip_vocabulary()),
        hidden_size=HEAD_DIM * heads,
        projection_dim=HEAD_DIM * heads,
        intermediate_size=4 * HEAD_DIM * heads,
        num_hidden_layers=2,
        num_attention_heads=heads,
        hidden_act=activation,
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config)


def write_single_file(layout: Path, path: Path) -> Path:
    tensors: dict[str, np.ndarray] = {}
    source = open_source(layout)
    for name, component in COMPONENTS.items():
        reader = source.component(name)
        ours = dict(reader.parameters())
        for row in assign_back(component.rules["stability"](parse_config(name, reader.config)), ours):
            tensors[component.prefix + row.source] = row.transform.to_torch([ours[target] for target in row.targets])
    tensors["text_encoders.clip_l.logit_scale"] = np.asarray(4.6, np.float32)
    write_safetensors(path, {name: (array.shape, array.dtype) for name, array in tensors.items()}, tensors.items())
    return path
