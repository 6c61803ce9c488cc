"""Checkpoints in every form, and what belongs to them: configurations and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.components import COMPONENTS, abstract_model, parse_config
from seg4diff_jax.convert.families import Naming
from seg4diff_jax.convert.names import Rule, assign_back, parameter_shapes
from seg4diff_jax.convert.readers import Source
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.convert.sources.safetensors_stream import read_header, read_tensor, write_safetensors
from seg4diff_jax.convert.sources.text_encoders import open_files
from seg4diff_jax.convert.tokenizers import open_tokenizers
from seg4diff_jax.convert.write import write_index
from seg4diff_jax.evaluation.expert import name_expert
from seg4diff_jax.models.stacked_layers import Layered
from seg4diff_jax.text import tokenize
from tests.fuzz.reader import OWN_ERRORS, Reader
from tests.reference.small_tokenizers import (
    clip_vocabulary,
    t5_vocabulary_size,
    write_clip_tokenizer,
    write_t5_tokenizer,
)

CLIP = {
    "vocab_size": len(clip_vocabulary()),
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "pos_embed_max_size": 6,
        "qk_norm": "rms_norm",
        "dual_attention_layers": [0],
        "expert_block": 1,
        "expert_step": 5,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [4, 4],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "mid_block_add_attention": False,
        "norm_num_groups": 2,
        "sample_size": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": CLIP,
    "text_encoder_2": CLIP | {"hidden_act": "gelu", "projection_dim": 4},
    "text_encoder_3": {
        "vocab_size": 8,
        "d_model": 8,
        "d_kv": 4,
        "num_heads": 2,
        "d_ff": 16,
        "num_layers": 1,
        "relative_attention_num_buckets": 4,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
    },
}
SCHEDULER = {"shift": 2.5}
TEXTS = ["a cat on the sofa", "traffic light, sky", "unheard of", ""]


def tensors_of(name: str, config: Mapping[str, Any], naming: Naming) -> dict[str, np.ndarray]:
    """Random tensors of a component under PyTorch's names."""
    rules = COMPONENTS[name].rules[naming](parse_config(name, dict(config)))
    return tensors_of_model(abstract_model(name, dict(config)), rules, seed=len(name))


def tensors_of_model(model: Layered, rules: list[Rule], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of an abstract model under PyTorch's names."""
    random = np.random.default_rng(seed)
    shapes = parameter_shapes(model)
    arrays = {ours: random.normal(size=shape).astype(np.float16) for ours, shape in shapes.items()}
    rows = assign_back(rules, arrays)
    return {row.source: row.transform.to_torch([arrays[target] for target in row.targets]) for row in rows}


def write(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(file, {name: (each.shape, each.dtype) for name, each in tensors.items()}, tensors.items())


def write_component(root: Path, name: str, *, shards: int = 1) -> None:
    tensors, stem = tensors_of(name, CONFIGS[name], "diffusers"), COMPONENTS[name].weights
    if shards == 1:
        write(root / name / f"{stem}.safetensors", tensors)
    else:
        places = {each: number * shards // len(tensors) + 1 for number, each in enumerate(tensors)}
        files = {each: f"{stem}-{place:05d}-of-{shards:05d}.safetensors" for each, place in places.items()}
        for file in sorted({*files.values()}):
            write(root / name / file, {each: tensors[each] for each in tensors if files[each] == file})
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (root / name / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (root / name / "config.json").write_text(json.dumps(CONFIGS[name], indent=2))


def make_folder(*names: str, shards: int = 1) -> Any:
    def make(root: Path) -> None:
        for name in names:
            write_component(root, name, shards=shards)
        write_index(root, SCHEDULER)

    return make


def contents(source: Source, *names: str) -> dict[str, Any]:
    """All that is read of a checkpoint's components, and of the checkpoint."""
    found: dict[str, Any] = {"schedule": source.schedule}
    if "transformer" in names:
        about = ("expert_block", "expert_step", "trained_size")
        found |= {each: getattr(source, each) for each in about}
    for name in names:
        component = source.component(name)
        component.check()
        found[name] = parse_config(name, source.configs[name]), dict(component.parameters())
    return found


def reads(*names: str) -> Any:
    return lambda root: contents(open_source(root, components=names), *names)


def make_single(root: Path) -> None:
    """As Stability publishes them; widths are multiples of the head's 64."""
    wide = CONFIGS["transformer"] | {"num_attention_heads": 1, "attention_head_dim": 64, "caption_projection_dim": 64}
    wide |= {"sample_size": 128}
    tensors = tensors_of("transformer", wide, "stability")
    write(root / "sd3.safetensors", {COMPONENTS["transformer"].prefix + name: each for name, each in tensors.items()})


def make_encoder_files(root: Path) -> None:
    wide = CLIP | {"hidden_size": 64, "num_attention_heads": 1, "projection_dim": 64, "hidden_act": "gelu"}
    tensors = tensors_of("text_encoder_2", wide, "stability")
    write(root / "clip_g.safetensors", tensors)
    write(root / "clip_l.safetensors", {name: each for name, each in tensors.items() if "projection" not in name})


def read_encoder_files(root: Path) -> Any:
    return contents(open_files(root, ["text_encoder", "text_encoder_2"], None), "text_encoder", "text_encoder_2")


def make_native(root: Path) -> None:
    original = root.with_name("original")
    make_folder("text_encoder", "transformer")(original)
    write_clip_tokenizer(original / "tokenizer", pad_token="!")
    root.rmdir()
    convert_checkpoint(original, root, components=["text_encoder", "transformer"])


def converted(root: Path) -> Any:
    """The record of a conversion's parameters."""
    target = root.with_name("target")
    convert_checkpoint(root, target, components=["text_encoder"])
    return json.loads((target / "manifest.json").read_text())["components"]


def make_convertible(root: Path) -> None:
    make_folder("text_encoder")(root)
    write_clip_tokenizer(root / "tokenizer", pad_token="!")


def make_tokenizers(root: Path) -> None:
    for name in ("text_encoder", "text_encoder_2"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(CONFIGS[name]))
    t5 = CONFIGS["text_encoder_3"] | {"vocab_size": t5_vocabulary_size()}
    (root / "text_encoder_3").mkdir()
    (root / "text_encoder_3" / "config.json").write_text(json.dumps(t5))
    write_index(root, SCHEDULER)
    write_clip_tokenizer(root / "tokenizer", pad_token="<|endoftext|>")
    write_clip_tokenizer(root / "tokenizer_2", pad_token="!")
    write_t5_tokenizer(root / "tokenizer_3")


def read_tokenizers(root: Path) -> Any:
    source = open_source(root, components=["text_encoder", "text_encoder_2", "text_encoder_3"])
    return tokenize(open_tokenizers(source, t5=True), TEXTS, t5_length=16)._asdict()


def read_tensors(root: Path) -> Any:
    return {name: read_tensor(info) for name, info in read_header(root / "weights.safetensors").items()}


def named_expert(root: Path) -> Any:
    name_expert(str(root), 0, 3)
    return {name: value for name, value in read_config(root).items() if name in CONFIGS["transformer"]}


def read_config(root: Path) -> dict[str, Any]:
    return json.loads((root / "transformer" / "config.json").read_text("utf-8"))


FOLDER = {
    "model_index.json": "json",
    "scheduler/*.json": "json",
    "*/config.json": "json",
    "*/*.safetensors": "safetensors",
}
MEANT = {
    r"config.json: (type|null|fraction|zero|negative|huge|deleted|listed): (sample_size|expert_step|expert_block|"
    r"scaling_factor|shift_factor|layer_norm_eps\w*|hidden_act|eos_token_id|_class_name|qk_norm|shift)\b": (
        "other values of these are sound, or they have a default"
    ),
}
FOLDERS = (
    "convert/sources/open.py",
    "convert/sources/diffusers_folder.py",
    "convert/sources/index.py",
    "convert/files.py",
    "convert/sources/safetensors_stream.py",
)

READERS: dict[str, Reader] = {
    "safetensors": Reader(
        lambda root: write(root / "weights.safetensors", tensors_of("text_encoder", CLIP, "diffusers")),
        read_tensors,
        ("convert/sources/safetensors_stream.py",),
        {"*": "safetensors"},
        {r": (flip|zeros|noise|rename|shape|billion|dtype|metadata|field): ": "any names and shapes will do"},
        cases=24,
    ),
    "diffusers transformer": Reader(
        make_folder("transformer", shards=2),
        reads("transformer"),
        FOLDERS,
        FOLDER | {"transformer/*.index.json": "json"},
        MEANT,
        cases=12,
    ),
    "diffusers vae": Reader(make_folder("vae"), reads("vae"), FOLDERS, FOLDER, MEANT, cases=8),
    "diffusers text encoder": Reader(
        make_folder("text_encoder"), reads("text_encoder"), FOLDERS, FOLDER, MEANT, cases=20
    ),
    "diffusers t5": Reader(make_folder("text_encoder_3"), reads("text_encoder_3"), FOLDERS, FOLDER, MEANT, cases=12),
    "single file": Reader(
        make_single,
        lambda root: contents(open_source(root / "sd3.safetensors"), "transformer"),
        ("convert/sources/single_file.py",),
        {"*": "safetensors"},
        cases=10,
    ),
    "text encoder files": Reader(
        make_encoder_files, read_encoder_files, ("convert/sources/text_encoders.py",), {"*": "safetensors"}, cases=10
    ),
    "native": Reader(
        make_native,
        reads("text_encoder"),
        ("convert/sources/native.py",),
        {
            "manifest.json": "json",
            "text_encoder/params/*/**/*": "summed",
            "text_encoder/config.json": "summed",
            "scheduler/*": "summed",
            "tokenizer/*": "summed",
        },
        cases=14,
    ),
    "conversion": Reader(
        make_convertible,
        converted,
        ("convert/checkpoint.py", "convert/staging.py"),
        {"text_encoder/*.safetensors": "safetensors", "text_encoder/config.json": "json"},
        MEANT,
        cases=8,
    ),
    "tokenizers": Reader(
        make_tokenizers,
        read_tokenizers,
        ("convert/tokenizers.py", "seg4diff_jax/text.py"),
        {"tokenizer*/*.json": "json", "tokenizer*/merges.txt": "text", "tokenizer_3/spiece.model": "pickle"},
        cases=20,
    ),
    "name expert": Reader(
        make_folder("transformer"),
        named_expert,
        ("seg4diff_jax/evaluation/expert.py",),
        {"transformer/config.json": "json"},
        {": ": "it keeps what it does not know"},
        errors=(*OWN_ERRORS, ValueError),
        cases=6,
    ),
}
