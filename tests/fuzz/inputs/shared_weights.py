"""Weights as they are shared: GGUF, scaled fp8, adapters under other tools' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from seg4diff_jax.convert.lora.adapters import read_lora
from seg4diff_jax.convert.sources.open import open_source
from tests.fuzz.inputs.adapters import value
from tests.fuzz.inputs.weights import MEANT, contents, make_single, write
from tests.fuzz.reader import Reader
from tests.reference.weight_files import CONFIGS, random_tensors, write_gguf

KINDS = ("Q8_0", "Q4_0", "F16")


def make_gguf(root: Path) -> None:
    tensors = random_tensors("transformer", "stability")
    kinds = {
        name: KINDS[place % len(KINDS)] if each.ndim == 2 and not each.shape[-1] % 32 else "F32"
        for place, (name, each) in enumerate(tensors.items())
    }
    write_gguf(root / "sd3.gguf", "sd3", tensors, kinds)


def make_scaled(root: Path) -> None:
    from seg4diff_jax.convert.sources.safetensors_stream import read_header, read_tensor

    make_single(root)
    file, tensors = root / "sd3.safetensors", {}
    for name, info in read_header(file).items():
        tensors[name] = read_tensor(info)
        if name.endswith("attn.qkv.weight"):
            tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = np.asarray(0.25, np.float32)
    tensors["model.diffusion_model.scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    write(file, tensors)


def make_alone(root: Path) -> None:
    write(root / "transformer.sft", random_tensors("transformer", "diffusers"))
    described = CONFIGS["transformer"] | {"_class_name": "SD3Transformer2DModel"}
    (root / "config.json").write_text(json.dumps(described), "utf-8")


def make_kohya(root: Path) -> None:
    random, tensors = np.random.default_rng(0), {}
    for block in (0, 1):
        for layer, width in (("x_block_attn_qkv", 48), ("context_block_attn_proj", 16)):
            name = f"lora_unet_joint_blocks_{block}_{layer}"
            tensors[f"{name}.lora_down.weight"] = random.normal(size=(2, 16)).astype(np.float32)
            tensors[f"{name}.lora_up.weight"] = random.normal(size=(width, 2)).astype(np.float32)
            tensors[f"{name}.alpha"] = np.asarray(1.0, np.float32)
    write(root / "kohya.safetensors", tensors)


def reads(name: str) -> Any:
    return lambda root: contents(open_source(root / name), "transformer")


READERS: dict[str, Reader] = {
    "gguf": Reader(
        make_gguf,
        reads("sd3.gguf"),
        ("convert/sources/gguf.py", "convert/sources/weight_files.py", "convert/sources/stored_tensor.py"),
        {"*": "gguf"},
        cases=6,
    ),
    "scaled fp8": Reader(
        make_scaled,
        reads("sd3.safetensors"),
        ("convert/sources/scaled_fp8.py", "convert/sources/weight_files.py"),
        {"*": "safetensors"},
        cases=6,
    ),
    "transformer alone": Reader(
        make_alone,
        reads("transformer.sft"),
        ("convert/sources/single_file.py", "convert/inferred_configs.py"),
        {"*.sft": "safetensors", "config.json": "json"},
        MEANT,
        cases=6,
    ),
    "lora kohya": Reader(
        make_kohya,
        lambda root: value(read_lora(root / "kohya.safetensors")),
        ("convert/lora/formats.py",),
        {"*": "safetensors"},
        {r"alpha: (and |is not described)|: (lose|rename): .*alpha": "a layer without alpha has its rank"},
        cases=12,
    ),
}
