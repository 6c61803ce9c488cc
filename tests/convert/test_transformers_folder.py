"""Models of transformers are read from the files that it saves, and damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.sources.transformers_folder import load_dino_model, load_whole_clip
from tests.reference.random_weights import randomize_
from tests.reference.scorers import WIDTH, save_scorers


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_scorers(tmp_path_factory.mktemp("transformers"))


def load(name: str, folder: Path) -> Any:
    return (load_whole_clip if name == "clip" else load_dino_model)(folder, dtype=jnp.float32)


def numbers(models: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(models))]


def same(first: Any, second: Any) -> bool:
    return all(np.array_equal(*pair) for pair in zip(numbers(first), numbers(second), strict=True))


def change(folder: Path, target: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """A copy whose tensors are changed, or left out where None."""
    copy = Path(shutil.copytree(folder, target))
    tensors = load_file(copy / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("name", ["clip", "vit", "dinov2"])
def test_a_pickled_file_alone_is_read_without_running_it(name, folders, tmp_path):
    copy = Path(shutil.copytree(folders[name], tmp_path / name))
    tensors = load_file(copy / "model.safetensors")
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]} if name == "clip" else {}  # in older files
    torch.save(tensors | ids, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert same(load(name, copy), load(name, folders[name]))
    torch.save({"model": Path("/")}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: refused: it refers to pathlib"):
        load(name, copy)
    torch.save({"a": torch.zeros(2), "step": 3}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: step: expected a tensor"):
        load(name, copy)
    torch.save([torch.zeros(2)], copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected tensors by name, found a list"):
        load(name, copy)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (transformers.ViTForImageClassification, "vit"),
        (transformers.ViTForMaskedImageModeling, "vit"),
        (transformers.Dinov2ForImageClassification, "dinov2"),
    ],
)
def test_a_model_with_a_head_is_read_without_it(kind, base, folders, tmp_path):
    config = transformers.AutoConfig.from_pretrained(folders[base])
    model = randomize_(kind(config))
    model.save_pretrained(tmp_path / "whole")
    getattr(model, base).save_pretrained(tmp_path / "alone")
    assert same(load(base, tmp_path / "whole"), load(base, tmp_path / "alone"))


def test_what_is_wrong_with_tensors_is_listed_at_once(folders, tmp_path):
    layer = "encoder.layer.1.attention"
    copy = change(
        folders["vit"],
        tmp_path / "vit",
        {
            "layernorm.weight": None,
            f"{layer}.output.dense.weight": torch.zeros(32, 31),
            f"{layer}.attention.query.bias": torch.zeros(32, dtype=torch.int8),
            "extra.weight": torch.zeros(2),
        },
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not match the model \(4 problems\)") as caught:
        load("vit", copy)
    for line in (
        "missing tensor layernorm.weight [32]",
        f"wrong shape of {layer}.output.dense.weight: expected [32, 32], found [32, 31]",
        f"only floating-point numbers are weights, found {layer}.attention.query.bias [32] int8",
        "surplus tensor extra.weight [2]",
    ):
        assert line in str(caught.value)


def test_tensors_of_a_model_with_a_head_are_named_as_in_the_file(tmp_path):
    config = transformers.ViTConfig(**WIDTH, image_size=32, patch_size=8, intermediate_size=64)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    copy = change(tmp_path / "vit", tmp_path / "copy", {"vit.layernorm.bias": None})
    with pytest.raises(CheckpointError, match=r"missing tensor vit\.layernorm\.bias \[32\]"):
        load("vit", copy)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("clip", {"model_type": "siglip"}, "expected the model_type clip, with a text_config and a vision_config"),
        ("clip", {"vision_config": None}, "expected the model_type clip"),
        ("clip", {"projection_dim": 16}, "wrong shape of text_projection.weight"),
        ("clip", {"projection_dim": "wide"}, "projection_dim is 'wide'; expected int"),
        ("vit", {"model_type": "deit"}, "a model that is not implemented: model_type is 'deit'; implemented: vit"),
        ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn is True"),
        ("dinov2", {"num_hidden_layers": 3}, "missing tensor encoder.layer.2"),
        ("vit", {"patch_size": 0}, "patch_size is 0; expected 1 to 1024"),
    ],
)
def test_configurations_of_other_models_are_refused(name, changes, message, folders, tmp_path):
    copy = shutil.copytree(folders[name], tmp_path / name)
    described = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=message):
        load(name, copy)


@pytest.mark.parametrize(
    ("absent", "message"), [("config.json", r"; it describes DINO \(ViTModel\)"), ("model.safetensors", "$")]
)
def test_absent_files_are_named(absent, message, folders, tmp_path):
    copy = shutil.copytree(folders["vit"], tmp_path / "vit")
    (copy / absent).unlink()
    with pytest.raises(CheckpointError, match=rf"{absent}: no such file{message}"):
        load("vit", copy)
