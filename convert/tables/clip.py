"""Name tables of CLIP's text tower: transformers' CLIPTextModelWithProjection, and Stability's single files.

The parts `text_encoders.clip_l.transformer.` and `text_encoders.clip_g.transformer.` of single files keep transformers'
names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seg4diff_jax.convert.names import LINEAR, NameTableError, Rule, Transform
from seg4diff_jax.models.clip import CLIPTextConfig


def _with_identity(scale: np.ndarray) -> tuple[np.ndarray, ...]:
    return scale, np.eye(len(scale)).astype(scale.dtype)


def _without_identity(arrays: Sequence[np.ndarray]) -> np.ndarray:
    scale, projection = arrays
    # All zeros is no projection: the caller asks for the shape only.
    if projection.any() and not np.array_equal(projection, np.eye(*projection.shape)):
        raise NameTableError(
            "text_projection.weight of CLIP-L is not the identity, and single files have no place for another: "
            "write the diffusers format"
        )
    return scale


SCALE_AND_IDENTITY = Transform(_with_identity, _without_identity)
"""Copies a norm's scale, and makes an identity projection of the same width beside it."""


def linear(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.kernel", LINEAR), Rule(f"{source}.bias", f"{target}.bias")]


def norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")]


def encoder(tower: str) -> list[Rule]:
    """Returns the rows of the layers of either tower, `text_model` or `vision_model`."""
    layer, block = f"{tower}.encoder.layers.{{i}}", "blocks.{i}"
    return [
        *norm(f"{layer}.layer_norm1", f"{block}.attention_norm"),
        *linear(f"{layer}.self_attn.q_proj", f"{block}.attention.q"),
        *linear(f"{layer}.self_attn.k_proj", f"{block}.attention.k"),
        *linear(f"{layer}.self_attn.v_proj", f"{block}.attention.v"),
        *linear(f"{layer}.self_attn.out_proj", f"{block}.attention.out"),
        *norm(f"{layer}.layer_norm2", f"{block}.mlp_norm"),
        *linear(f"{layer}.mlp.fc1", f"{block}.up"),
        *linear(f"{layer}.mlp.fc2", f"{block}.down"),
    ]


def _tower() -> list[Rule]:
    """Returns the rows of the text tower, without the final norm's scale and the projection."""
    return [
        Rule("text_model.embeddings.token_embedding.weight", "token_embedding.embedding"),
        Rule("text_model.embeddings.position_embedding.weight", "position_embedding.embedding"),
        Rule("text_model.embeddings.position_ids", ()),
        *encoder("text_model"),
        Rule("text_model.final_layer_norm.bias", "final_norm.bias"),
        Rule("vision_model.{rest}", ()),  # in files of a whole CLIP, of which only the text tower is read
        Rule("visual_projection.weight", ()),
        Rule("logit_scale", ()),
    ]


def diffusers(config: CLIPTextConfig) -> list[Rule]:
    return [
        *_tower(),
        Rule("text_model.final_layer_norm.weight", "final_norm.scale"),
        Rule("text_projection.weight", "projection.kernel", LINEAR),
    ]


def stability(config: CLIPTextConfig) -> list[Rule]:
    """Returns the rows for single files, in which OpenAI's tower (the one with quick_gelu) is not projected.

    Its projection is the identity, even if the file holds another one. Stability's own code reads the pooled state
    before the projection, and diffusers puts the identity in the projection's place.
    """
    if config.hidden_act != "quick_gelu":
        return diffusers(config)
    return [
        *_tower(),
        Rule("text_model.final_layer_norm.weight", ("final_norm.scale", "projection.kernel"), SCALE_AND_IDENTITY),
        Rule("text_projection.weight", ()),
    ]
