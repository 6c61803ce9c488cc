"""Write a small SD3 with random weights, in diffusers' format, and a picture to try it on. PyTorch is not needed.

    python examples/random_checkpoint.py DIRECTORY

DIRECTORY/checkpoint holds what a published checkpoint holds, file by file, but for T5: `seg4diff segment` reads it, and
so does diffusers' StableDiffusion3Pipeline. It has learned nothing: its masks show that everything runs, and no more.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from convert.components import COMPONENTS, abstract_model, parse_config
from convert.names import assign_back, parameter_shapes
from convert.readers import MODEL_INDEX, SCHEDULER
from convert.safetensors_stream import write_safetensors
from seg4diff_jax.models.mmdit import sincos_table

START, END = "<|startoftext|>", "<|endoftext|>"
HEADS = 3
WIDTH = 64 * HEADS


def clip_config(width: int, activation: str) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": len(vocabulary()),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": width // 32,
        "projection_dim": width,
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as published: it is not the tokenizers' end token
        "pad_token_id": 1,
    }


def configurations() -> dict[str, dict[str, Any]]:
    """SD3's published ones, smaller. `expert_block` is ours: the block that masks are read from."""
    transformer = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 64,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 6,
        "num_attention_heads": HEADS,
        "attention_head_dim": 64,
        "caption_projection_dim": WIDTH,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 64 + 96,
        "pos_embed_max_size": 64,
        "expert_block": 3,
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "sample_size": 512,
        "block_out_channels": [16, 32, 32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": clip_config(64, "quick_gelu"),
        "text_encoder_2": clip_config(96, "gelu"),
    }


def write_checkpoint(directory: Path, seed: int = 0) -> None:
    for name, config in configurations().items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / name / "config.json").write_text(json.dumps(config, indent=2))
        write_weights(directory / name / f"{COMPONENTS[name].weights}.safetensors", name, config, seed)
    for name, pad_token in {"tokenizer": END, "tokenizer_2": "!"}.items():
        write_tokenizer(directory / name, pad_token)
    (directory / "scheduler").mkdir(exist_ok=True)
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2))
    index = {**MODEL_INDEX, "text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2))


def write_weights(path: Path, component: str, config: dict[str, Any], seed: int) -> None:
    """Random parameters of one of our models, under the names and in the layout that PyTorch's has."""
    parsed = parse_config(component, config)
    parameters = {
        name: random_parameter(name, shape, seed)
        for name, shape in parameter_shapes(abstract_model(component, config)).items()
    }
    if component == "transformer":
        parameters["pos_embed"] = np.asarray(sincos_table(parsed))
    rows = assign_back(COMPONENTS[component].rules["diffusers"](parsed), parameters)
    tensors = {row.source: row.transform.to_torch([parameters[name] for name in row.targets]) for row in rows}
    write_safetensors(path, {name: (array.shape, array.dtype) for name, array in tensors.items()}, tensors.items())


def random_parameter(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Noise that keeps activations at their size: weights of size 1 / sqrt(inputs), norms near 1, small biases."""
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    if name.endswith("scale"):
        return 1 + np.float32(0.1) * noise
    if len(shape) == 1:
        return np.float32(0.1) * noise
    if name.endswith("embedding"):
        return noise
    return noise / np.float32(np.sqrt(np.prod(shape[:-1])))


def vocabulary() -> dict[str, int]:
    """CLIP's single bytes, each also as the end of a word, and the special tokens; the end token comes last."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), START, END]
    return {token: number for number, token in enumerate(tokens)}


def write_tokenizer(directory: Path, pad_token: str) -> None:
    """CLIP's kind of tokenizer without merges: a token is a letter."""
    directory.mkdir(exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": pad_token, "unk_token": END}
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = special | {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def draw_picture() -> Image.Image:
    """A house between a tree and a pond under the sun, 640 x 480."""
    picture = Image.new("RGB", (640, 480), (135, 190, 235))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((500, 40, 580, 120), fill=(255, 225, 90))
    draw.rectangle((0, 310, 640, 480), fill=(95, 155, 70))
    draw.rectangle((230, 220, 430, 380), fill=(205, 175, 140))
    draw.polygon([(210, 220), (330, 120), (450, 220)], fill=(160, 60, 50))
    draw.rectangle((310, 300, 355, 380), fill=(95, 60, 40))
    draw.rectangle((255, 250, 295, 290), fill=(175, 215, 240))
    draw.rectangle((90, 260, 120, 390), fill=(105, 75, 45))
    draw.ellipse((30, 120, 180, 290), fill=(45, 110, 50))
    draw.ellipse((460, 380, 620, 450), fill=(70, 120, 190))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where checkpoint/ and picture.png go")
    directory = parser.parse_args().directory
    write_checkpoint(directory / "checkpoint")
    draw_picture().save(directory / "picture.png")
    print(f"wrote {directory / 'checkpoint'} (random weights: masks made with it mean nothing)")
    print(f"wrote {directory / 'picture.png'}")


if __name__ == "__main__":
    main()
