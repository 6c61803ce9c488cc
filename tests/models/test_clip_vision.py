"""CLIP's vision tower equals transformers' CLIPVisionModelWithProjection, and transformers reads what is written."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import CLIPVisionModelWithProjection

from seg4diff_jax.convert.assemble import abstract, from_state_dict
from seg4diff_jax.convert.tables import clip_vision as table
from seg4diff_jax.convert.write import write_model
from seg4diff_jax.miniature.contrastive import vision_config
from seg4diff_jax.models.clip_vision import CLIPVision, CLIPVisionConfig
from tests.reference.random_weights import randomize_, relative_error

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "projection_dim": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def make_pair(**changes) -> tuple[CLIPVisionModelWithProjection, CLIPVision]:
    theirs = randomize_(CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SMALL | changes)))
    parsed = CLIPVisionConfig.from_json(theirs.config.to_dict())
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    model = abstract(lambda rngs: CLIPVision(parsed, rngs=rngs))
    return theirs, from_state_dict(model, table.diffusers(parsed), tensors)


def make_pixels() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)


@torch.no_grad()
def project(theirs: CLIPVisionModelWithProjection, pixels: np.ndarray) -> torch.Tensor:
    return theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2)).image_embeds


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_projected_picture_equals_transformers(activation):
    theirs, ours = make_pair(hidden_act=activation)
    pixels = make_pixels()
    assert relative_error(np.asarray(ours(jnp.asarray(pixels))), project(theirs, pixels)) <= 1e-5


def test_transformers_reads_what_is_written(tmp_path):
    theirs, ours = make_pair()
    write_model(
        tmp_path / "encoder", "model", vision_config(ours.config), ours, table.diffusers(ours.config), "float32"
    )
    again = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "encoder")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_pictures_of_another_size_and_unknown_activations_are_refused():
    _, ours = make_pair()
    with pytest.raises(ValueError, match="16 x 16; this CLIP sees 32 x 32"):
        ours(jnp.zeros((1, 16, 16, 3)))
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        CLIPVisionConfig.from_json(SMALL | {"hidden_act": "relu"})
