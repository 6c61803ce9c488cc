"""Name table of CLIP's vision tower: transformers' CLIPVisionModelWithProjection."""

from __future__ import annotations

from seg4diff_jax.convert.names import CONV, LINEAR, Rule
from seg4diff_jax.convert.tables.clip import encoder, norm
from seg4diff_jax.models.clip_vision import CLIPVisionConfig


def diffusers(config: CLIPVisionConfig) -> list[Rule]:
    embeddings = "vision_model.embeddings"
    return [
        Rule(f"{embeddings}.class_embedding", "class_embedding"),
        Rule(f"{embeddings}.patch_embedding.weight", "patch_embedding.kernel", CONV),
        Rule(f"{embeddings}.position_embedding.weight", "position_embedding.embedding"),
        Rule(f"{embeddings}.position_ids", ()),
        *norm("vision_model.pre_layrnorm", "first_norm"),
        *encoder("vision_model"),
        *norm("vision_model.post_layernorm", "final_norm"),
        Rule("visual_projection.weight", "projection.kernel", LINEAR),
        Rule("text_model.{rest}", ()),  # in files of a whole CLIP
        Rule("text_projection.weight", ()),
        Rule("logit_scale", ()),
    ]
