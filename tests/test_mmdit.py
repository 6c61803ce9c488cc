"""The MM-DiT equals diffusers' SD3Transformer2DModel: velocity, every block, every attention map, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from convert.assemble import abstract, from_state_dict
from convert.tables import mmdit as table
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.mmdit import MMDiT, MMDiTConfig, attention_at, sincos_table
from tests.reference.random_weights import randomize_, relative_error

SMALL = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 40,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 24,
    "out_channels": 16,
    "pos_embed_max_size": 14,
}
VARIANTS = {
    "sd3": SMALL,
    "sd3.5-medium": SMALL | {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]},
    "sd3.5-large": SMALL
    | {"qk_norm": "rms_norm", "num_layers": 6, "num_attention_heads": 5, "caption_projection_dim": 80},
    "scattered dual attention": SMALL | {"dual_attention_layers": [1, 3]},
}


def make_pair(config: dict, seed: int = 0) -> tuple[SD3Transformer2DModel, MMDiT]:
    theirs = randomize_(SD3Transformer2DModel(**config), seed)
    parsed = MMDiTConfig.from_json(dict(theirs.config))
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    ours = from_state_dict(abstract(lambda rngs: MMDiT(parsed, rngs=rngs)), table.diffusers(parsed), tensors)
    return theirs, ours


def make_inputs(config: dict, size: tuple[int, int] = (16, 16), text: int = 9, batch: int = 2, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {
        "latents": draw(batch, *size, config["in_channels"]),
        "timesteps": np.linspace(515.072, 900, batch, dtype=np.float32),
        "context": draw(batch, text, config["joint_attention_dim"]),
        "pooled": draw(batch, config["pooled_projection_dim"]),
    }


def run_torch(model: SD3Transformer2DModel, inputs: dict) -> torch.Tensor:
    return model(
        hidden_states=torch.from_numpy(inputs["latents"]).permute(0, 3, 1, 2),
        encoder_hidden_states=torch.from_numpy(inputs["context"]),
        pooled_projections=torch.from_numpy(inputs["pooled"]),
        timestep=torch.from_numpy(inputs["timesteps"]),
    ).sample.permute(0, 2, 3, 1)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(variant):
    return make_pair(VARIANTS[variant])


@pytest.mark.parametrize(("size", "text"), [((16, 16), 9), ((8, 20), 12), ((28, 6), 5)])
def test_velocity_equals_diffusers(pair, variant, size, text):
    theirs, ours = pair
    inputs = make_inputs(VARIANTS[variant], size, text)
    with torch.no_grad():
        expected = run_torch(theirs, inputs)
    velocity, records = jax.jit(lambda model, inputs: model(**inputs))(ours, inputs)
    assert records == {}
    assert relative_error(velocity, expected) <= 1e-5
