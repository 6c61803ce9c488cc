"""Small SD3 transformers, ours and diffusers', with the same random weights, and inputs for both."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import SD3Transformer2DModel

from seg4diff_jax.convert.assemble import abstract, from_state_dict
from seg4diff_jax.convert.tables import mmdit as table
from seg4diff_jax.models.attention import IMAGE_TO_TEXT, AttentionRequest, ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.sd3.model import (
    MMDiT,
    MMDiTConfig,
)
from tests.reference.random_weights import SD3_QUERIES, randomize_, temper_

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
    "sd3.5-large": SMALL | {"qk_norm": "rms_norm", "num_attention_heads": 5, "caption_projection_dim": 80},
    "scattered dual attention": SMALL | {"dual_attention_layers": [1, 3]},
}


def make_pair(config: dict, seed: int = 0) -> tuple[SD3Transformer2DModel, MMDiT]:
    theirs = randomize_(SD3Transformer2DModel(**config), seed)
    if theirs.config.qk_norm is None:
        temper_(theirs, SD3_QUERIES, 2)
    parsed = MMDiTConfig.from_json(dict(theirs.config))
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    ours = from_state_dict(abstract(lambda rngs: MMDiT(parsed, rngs=rngs)), table.diffusers(parsed), tensors)
    return theirs, ours


def make_inputs(config: dict, size: tuple[int, int] = (16, 16), text: int = 9, batch: int = 2, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(np.float32))
    return {
        "latents": draw(batch, *size, config["in_channels"]),
        "timesteps": jnp.asarray(np.linspace(515.072, 900, batch, dtype=np.float32)),
        "conditioning": TextConditioning(
            draw(batch, text, config["joint_attention_dim"]),
            draw(batch, config["pooled_projection_dim"]),
            segments=(("clip", text),),
        ),
    }


def equal_tail(inputs: dict, tokens: int) -> tuple[dict, dict]:
    """Inputs whose last tokens are zeros, all of them computed; and the same, one of them computed for all."""
    given = inputs["conditioning"]
    context = np.array(given.context)
    context[:, -tokens:] = 0
    context = jnp.asarray(context)
    both = (TextConditioning.from_full(context, given.pooled, equal, given.segments) for equal in (1, tokens))
    full, once = ({**inputs, "conditioning": conditioning} for conditioning in both)
    return full, once


def tensors_of(inputs: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    text = inputs["conditioning"]
    arrays = {name: inputs[name] for name in ("latents", "timesteps")}
    arrays |= {"context": text.full_context, "pooled": text.pooled}
    return {name: torch.tensor(np.asarray(array), dtype=dtype) for name, array in arrays.items()}


def run_torch(model: SD3Transformer2DModel, inputs: dict) -> torch.Tensor:
    inputs = tensors_of(inputs, model.dtype)
    return model(
        hidden_states=inputs["latents"].permute(0, 3, 1, 2),
        encoder_hidden_states=inputs["context"],
        pooled_projections=inputs["pooled"],
        timestep=inputs["timesteps"],
    ).sample.permute(0, 2, 3, 1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def forward(model: MMDiT, inputs: dict, capture=(), request: AttentionRequest = IMAGE_TO_TEXT):
    return model(**inputs, capture=capture, options=ForwardOptions(request))
