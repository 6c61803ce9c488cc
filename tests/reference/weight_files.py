"""Files of weights as people share them, small and of random numbers: safetensors in any names, and GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

from seg4diff_jax.convert.components import COMPONENTS, abstract_model, parse_config
from seg4diff_jax.convert.families import Naming
from seg4diff_jax.convert.names import assign_back, parameter_shapes
from seg4diff_jax.convert.sources.safetensors_stream import write_safetensors

Arrays = dict[str, np.ndarray]
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "caption_projection_dim": 256,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 96,
        "pos_embed_max_size": 4,
        "sample_size": 128,
        "dual_attention_layers": [0],
        "qk_norm": "rms_norm",
    },
    "text_encoder_3": {
        "vocab_size": 40,
        "d_model": 256,
        "d_ff": 512,
        "d_kv": 32,
        "num_heads": 4,
        "num_layers": 2,
        "feed_forward_proj": "gated-gelu",
    },
}
"""Wide enough for blocks of 256 numbers."""


def random_tensors(component: str, naming: Naming) -> Arrays:
    """Every tensor of a component, float32, under the names that files of that kind have."""
    config = CONFIGS[component]
    shapes = parameter_shapes(abstract_model(component, config))
    rows = assign_back(COMPONENTS[component].rules[naming](parse_config(component, config)), shapes)
    random = np.random.default_rng(0)
    zero = np.float32(0)
    empty = {
        row.source: row.transform.to_torch([np.broadcast_to(zero, shapes[t]) for t in row.targets]) for row in rows
    }
    return {name: random.normal(size=array.shape).astype(np.float32) for name, array in empty.items()}


def write_plain(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    write_safetensors(path, {name: (array.shape, array.dtype) for name, array in tensors.items()}, tensors.items())
    return path


def random_blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Bytes, uint8 [..., bytes of a row], drawn at random; where they would stand for no finite number, zeros."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(kind.value).integers(0, 256, (int(np.prod(shape)) // block, size), np.uint8)
    with np.errstate(all="ignore"):
        data[~np.isfinite(dequantize(data, kind)).all(axis=-1)] = 0
    return data.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path, architecture: str | None, tensors: Mapping[str, np.ndarray], kinds: Mapping[str, str]
) -> Arrays:
    """Write a file with the `gguf` package. Returns that package's own dequantisation of it, in float32.

    Args:
      kinds: of each tensor, ggml's name for its type. Blocks of K-quants, which the package does not write, are drawn.
    """
    writer = gguf.GGUFWriter(path, architecture or "sd3")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    meant: Arrays = {}
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType[kinds[name]]
        data = random_blocks(array.shape, kind) if kind.name.endswith("_K") else quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        meant[name] = dequantize(data, kind).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def kinds_in_turn(tensors: Mapping[str, np.ndarray], kinds: tuple[str, ...]) -> dict[str, str]:
    """A type for each tensor, as converters choose them: F32 for vectors, what rows allow for matrices."""
    chosen = {}
    for number, (name, array) in enumerate(tensors.items()):
        fitting = [k for k in kinds if not array.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[k]][0]]
        chosen[name] = fitting[number % len(fitting)] if array.ndim == 2 else "F16" if array.ndim > 2 else "F32"
    return chosen
