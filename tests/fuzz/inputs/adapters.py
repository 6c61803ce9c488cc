"""Adapters in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from seg4diff_jax.convert.components import abstract_model, parse_config
from seg4diff_jax.convert.lora.adapters import convert_lora, read_lora, write_lora
from seg4diff_jax.convert.lora.files import PEFT_CONFIG, Format
from seg4diff_jax.convert.lora.formats import LoRACheckpoint
from seg4diff_jax.convert.lora.run import read_run
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.magnet.adapter_files import HEAD_FILE, PREFIX, begin
from seg4diff_jax.models.lora import Adapter, LoRAConfig
from seg4diff_jax.training.checkpoints import Checkpoints
from seg4diff_jax.training.state import TrainState
from tests.fuzz.inputs.weights import CONFIGS
from tests.fuzz.reader import OWN_ERRORS, Reader

TARGETS = ("image.attention.q", "image.attention.v")
RANK, WIDTH = 2, 16
CONFIG = LoRAConfig(RANK, 16.0, TARGETS, (0, 1))
FILES: dict[Format, str] = {
    "native": "adapters.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "peft": "adapter",
    "release": "lora_weights.pth",
}


def checkpoint(**others: np.ndarray) -> LoRACheckpoint:
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    adapters = {
        f"blocks.{block}.{target}": Adapter(normal(WIDTH, RANK), normal(RANK, WIDTH))
        for block in (0, 1)
        for target in TARGETS
    }
    return LoRACheckpoint(CONFIG, adapters, others)


def make(to: Format) -> Any:
    others = {"attn_mlp.attn_score_layer.0.bias": np.ones(4, np.float32)} if to in ("native", "release") else {}
    return lambda root: write_lora(checkpoint(**others), root / FILES[to], to=to)


def value(read: LoRACheckpoint) -> Any:
    return read.config, read.adapters, read.others


def reads(to: Format) -> Any:
    return lambda root: value(read_lora(root / FILES[to]))


def make_legacy(root: Path) -> None:
    """As `torch.save` wrote files before PyTorch 1.6."""
    import torch

    make("release")(root)
    file = root / FILES["release"]
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)


def converted(root: Path) -> Any:
    target = root.with_name("target.safetensors")
    convert_lora(root / FILES["diffusers"], target, to="native")
    return value(read_lora(target))


def make_run(root: Path) -> None:
    """What MAGNET's training of the miniature keeps, with adapters narrower than its layers."""
    config = parse_config("transformer", open_source("miniature").configs["transformer"])
    normal = np.random.default_rng(0).normal
    factors = {
        f"transformer.{stack.path}.{target}.lora_{side}": normal(size=(stack.stop - stack.start, *shape))
        for stack in config.layer_stacks(config.num_layers)
        for target in TARGETS
        for side, shape in (("a", (WIDTH, RANK)), ("b", (RANK, WIDTH)))
    }
    trained = {name: array.astype(np.float32) for name, array in factors.items()}
    state = TrainState(np.int32(3), trained, {"momentum": np.ones(3, np.float32)}, None, np.zeros(2, np.uint32))
    record = {"task": "magnet", "model": "miniature", "lora": {"rank": RANK, "alpha": 16.0, "blocks": None}}
    with Checkpoints(root, keep=2, best="miou") as checkpoints:
        checkpoints.save(3, state, 1, record, {"miou": 12.5})


def make_head(root: Path) -> None:
    make("native")(root)
    write_lora(checkpoint(), root / FILES["native"], to="native", overwrite=True)
    random, shapes = np.random.default_rng(1), {}
    for number, (outputs, inputs) in enumerate(((64, 1), (64, 64), (1, 64))):
        shapes |= {f"{2 * number}.weight": (outputs, inputs, 3, 3), f"{2 * number}.bias": (outputs,)}
    head = {PREFIX + name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(head, root / HEAD_FILE)


def read_head(root: Path) -> Any:
    model = abstract_model("transformer", CONFIGS["transformer"])
    _, head = begin(model, CONFIG, str(root), with_head=True, seed=0)
    return {str(path): np.asarray(each.get_value()) for path, each in nnx.to_flat_state(nnx.state(head))}


STATED = {
    r": (zero|negative|fraction|huge): lora_alpha": "another sound alpha",
    r": deleted: ": "PEFT's default",
}
FORMATS = ("convert/lora/adapters.py", "convert/lora/files.py", "convert/lora/formats.py")

READERS: dict[str, Reader] = {
    "lora native": Reader(
        make("native"), reads("native"), FORMATS, {"*": "safetensors"}, {": metadata: ": "it may say more"}, cases=16
    ),
    "lora diffusers": Reader(
        make("diffusers"),
        reads("diffusers"),
        FORMATS,
        {"*": "safetensors"},
        {": metadata: ": "without it alpha is the rank, as in diffusers"},
        cases=16,
    ),
    "lora peft": Reader(
        make("peft"),
        reads("peft"),
        FORMATS,
        {"adapter/*.safetensors": "safetensors", f"adapter/{PEFT_CONFIG}": "json"},
        STATED,
        cases=24,
    ),
    "lora release": Reader(
        make("release"), reads("release"), ("convert/sources/torch_pickle.py",), {"*": "zip"}, cases=24
    ),
    "lora release, legacy": Reader(
        make_legacy, reads("release"), ("convert/sources/torch_pickle.py",), {"*": "pickle"}, cases=10
    ),
    "lora conversion": Reader(
        make("diffusers"),
        converted,
        ("convert/lora/adapters.py", "convert/staging.py"),
        {"*": "safetensors"},
        {": metadata: ": "without it alpha is the rank, as in diffusers"},
        cases=10,
    ),
    "lora checkpoint": Reader(
        make_run,
        lambda root: value(read_run(root, "best")),
        ("convert/lora/run.py",),
        {
            "checkpoints/3/config/metadata": "summed",
            "checkpoints/3/metrics/metrics": "json",
            "checkpoints/3/state/**/*": "summed",
        },
        cases=20,
    ),
    "mask head": Reader(
        make_head,
        read_head,
        ("seg4diff_jax/magnet/adapter_files.py",),
        {HEAD_FILE: "safetensors"},
        {": absent: ": "then a fresh one is trained"},
        errors=(*OWN_ERRORS, ValueError),
        cases=16,
    ),
}
