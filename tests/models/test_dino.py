"""DINO and DINOv2 equal transformers' ViTModel and Dinov2Model, read from the folders that these save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from seg4diff_jax.convert.sources.transformers_folder import load_dino_model
from seg4diff_jax.models.dino import DINO, DINOConfig, bicubic_matrix
from tests.reference.random_weights import randomize_, relative_error

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
VIT16 = SMALL | {"intermediate_size": 72, "image_size": 64, "patch_size": 16}
VIT8 = VIT16 | {"image_size": 40, "patch_size": 8}
DINOV2 = SMALL | {"image_size": 70, "patch_size": 14}


def randomized(theirs: Any) -> Any:
    """Every parameter random, position embeddings as large as the patches'."""
    randomize_(theirs)
    with torch.no_grad():
        theirs.embeddings.position_embeddings.normal_(generator=torch.Generator().manual_seed(1))
    return theirs


def make_pair(options: dict[str, Any], folder: Path) -> tuple[Any, DINO]:
    dinov2 = options["patch_size"] == 14
    theirs = randomized(Dinov2Model(Dinov2Config(**options)) if dinov2 else ViTModel(ViTConfig(**options)))
    theirs.save_pretrained(folder)
    return theirs, load_dino_model(folder, dtype=jnp.float32)


def make_pixels(height: int, width: int, pictures: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(-2, 2, (pictures, height, width, 3)).astype(np.float32)


@torch.no_grad()
def class_token(theirs: Any, pixels: np.ndarray, **options: Any) -> torch.Tensor:
    return theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2), **options).last_hidden_state[:, 0]


@pytest.mark.parametrize("options", [VIT16, VIT8, DINOV2], ids=["patch 16", "patch 8", "DINOv2"])
def test_the_class_token_equals_transformers(options, tmp_path):
    theirs, ours = make_pair(options, tmp_path)
    pixels = make_pixels(options["image_size"], options["image_size"])
    assert relative_error(np.asarray(ours(jnp.asarray(pixels))), class_token(theirs, pixels)) <= 1e-5


@pytest.mark.parametrize(("height", "width"), [(56, 56), (70, 98), (140, 42), (14, 14)])
def test_dinov2_sees_other_sizes_as_transformers_does(height, width, tmp_path):
    theirs, ours = make_pair(DINOV2, tmp_path)
    pixels = make_pixels(height, width)
    assert relative_error(np.asarray(ours(jnp.asarray(pixels))), class_token(theirs, pixels)) <= 1e-5


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 64), (80, 24)])
def test_dino_sees_other_sizes_as_transformers_does_when_asked_to_interpolate(height, width, tmp_path):
    theirs, ours = make_pair(VIT8, tmp_path)
    pixels = make_pixels(height, width)
    expected = class_token(theirs, pixels, interpolate_pos_encoding=True)
    assert relative_error(np.asarray(ours(jnp.asarray(pixels))), expected) <= 1e-5


@pytest.mark.parametrize(("source", "target"), [(5, 4), (5, 12), (37, 16), (14, 28), (3, 1), (1, 3), (7, 7)])
def test_bicubic_weights_are_those_of_pytorch(source, target):
    rows = torch.eye(source)[None, None]
    expected = torch.nn.functional.interpolate(rows, (target, source), mode="bicubic", align_corners=False)[0, 0]
    np.testing.assert_allclose(bicubic_matrix(source, target), expected, atol=1e-5)


def test_sides_that_patches_do_not_fill_are_refused(tmp_path):
    _, ours = make_pair(VIT16, tmp_path)
    with pytest.raises(ValueError, match="pixels are 64 x 60; sides must be multiples of the patch size, 16"):
        ours(jnp.zeros((1, 64, 60, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip"}, r"model_type is 'clip'; implemented: vit \(DINO\), dinov2"),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, "use_swiglu_ffn is True, as in DINOv2's giant"),
        ({"qkv_bias": False}, "qkv_bias is False; implemented: True"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_size": 30}, "hidden_size is 30; it must be a multiple of num_attention_heads = 4"),
        ({"image_size": 8}, "image_size is 8; expected at least patch_size = 16"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DINOConfig.from_json({"model_type": "vit"} | VIT16 | changes)


def test_a_configuration_without_a_model_type_is_refused():
    with pytest.raises(ValueError, match="model_type is None"):
        DINOConfig.from_json(VIT16)


def test_absent_values_are_transformers_defaults():
    for kind, theirs in (("vit", ViTConfig()), ("dinov2", Dinov2Config())):
        ours = DINOConfig.from_json({"model_type": kind})
        shared = {name for name in DINOConfig.__dataclass_fields__ if hasattr(theirs, name)}
        assert {name: getattr(ours, name) for name in shared} == {name: getattr(theirs, name) for name in shared}
        assert ours.intermediate_size == 3072


REAL = {
    "ViT-S/16": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 16},
    "ViT-B/16": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "patch_size": 16},
    "DINOv2-small": {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_published_shapes_equal_transformers(name, tmp_path):
    theirs, ours = make_pair({"num_hidden_layers": 12, "image_size": 224} | REAL[name], tmp_path)
    pixels = make_pixels(224, 224)
    error = relative_error(np.asarray(ours(jnp.asarray(pixels))), class_token(theirs, pixels))
    print(f"{name}: {error:.1e}")
    assert error <= 1e-4
