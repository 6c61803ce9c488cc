"""Small random SD3 checkpoints in diffusers' format, laid out file by file like the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.reference.random_weights import SD3_QUERIES, randomize_, temper_
from tests.reference.small_tokenizers import (
    clip_vocabulary,
    t5_vocabulary_size,
    write_clip_tokenizer,
    write_t5_tokenizer,
)

Variant = Literal["sd3", "sd3, 24 blocks", "sd3.5-medium", "sd3.5-large"]

JOINT_WIDTH = 96
"""Width of T5's states, and what the two CLIPs' states (32 and 48 wide) are zero-padded to."""
POOLED_WIDTH = 24 + 32
TRANSFORMERS: dict[Variant, dict] = {
    "sd3": {"num_layers": 6, "num_attention_heads": 4},
    "sd3, 24 blocks": {"num_layers": 24, "num_attention_heads": 4},
    "sd3.5-medium": {
        "num_layers": 5,
        "num_attention_heads": 4,
        "dual_attention_layers": (0, 1, 2),
        "qk_norm": "rms_norm",
    },
    "sd3.5-large": {"num_layers": 8, "num_attention_heads": 6, "qk_norm": "rms_norm"},
}
HEAD_WIDTH = 16


def make_checkpoint(
    directory: str | Path,
    *,
    variant: Variant = "sd3",
    t5: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sample_size: int = 16,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a checkpoint that `StableDiffusion3Pipeline.from_pretrained` loads.

    Args:
      directory: made if absent.
      t5: False leaves out `text_encoder_3` and `tokenizer_3`; diffusers then has to be told both names with None.
      sample_size: side of the square latent image that the configuration names; the pixels' side is 8 times that.
      max_shard_size: files of the transformer and of T5 larger than this are split, as in `"50KB"`.
    """
    directory = Path(directory)
    transformer = make_transformer(variant, sample_size)
    modules: dict[str, torch.nn.Module] = {
        "transformer": transformer,
        "vae": make_vae(8 * sample_size),
        "text_encoder": make_clip(width=32, heads=4, projection=24, activation="quick_gelu"),
        "text_encoder_2": make_clip(width=48, heads=3, projection=32, activation="gelu"),
    }
    if t5:
        modules["text_encoder_3"] = make_t5()
    for number, (name, module) in enumerate(modules.items()):
        shards = {"max_shard_size": max_shard_size} if name in ("transformer", "text_encoder_3") else {}
        randomize_(module, seed + number)
        if isinstance(module, T5EncoderModel):
            temper_(module, ("SelfAttention.q.weight",), module.config.d_kv**0.5)
        if isinstance(module, SD3Transformer2DModel):
            temper_(module, SD3_QUERIES, 5)
        if dtype != torch.float32:
            module.to(dtype)
        module.save_pretrained(directory / name, **shards)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).save_pretrained(directory / "scheduler")
    write_clip_tokenizer(directory / "tokenizer", pad_token="<|endoftext|>")
    write_clip_tokenizer(directory / "tokenizer_2", pad_token="!")
    if t5:
        write_t5_tokenizer(directory / "tokenizer_3")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.29.0.dev0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"] if t5 else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"] if t5 else [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (directory / "model_index.json").write_text(json.dumps(index, indent=2))
    return directory


def make_transformer(variant: Variant, sample_size: int) -> SD3Transformer2DModel:
    settings = TRANSFORMERS[variant]
    return SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        attention_head_dim=HEAD_WIDTH,
        caption_projection_dim=HEAD_WIDTH * settings["num_attention_heads"],
        joint_attention_dim=JOINT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=3 * sample_size // 2,
        **settings,
    )


def make_vae(sample_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=sample_size,
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_clip(*, width: int, heads: int, projection: int, activation: str) -> CLIPTextModelWithProjection:
    # The published configurations name special tokens that their tokenizers do not have; so does this one.
    config = CLIPTextConfig(
        vocab_size=len(clip_vocabulary()),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        projection_dim=projection,
        hidden_act=activation,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config)


def make_t5(width: int = JOINT_WIDTH) -> T5EncoderModel:
    config = T5Config(
        vocab_size=t5_vocabulary_size() + 28,  # the published embedding has 28 unused rows
        d_model=width,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)
