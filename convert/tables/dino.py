"""Name table of DINO and DINOv2: transformers' ViTModel and Dinov2Model, as `save_pretrained` writes them."""

from __future__ import annotations

from seg4diff_jax.convert.names import CONV, Rule
from seg4diff_jax.convert.tables.clip import linear, norm
from seg4diff_jax.models.dino import DINOConfig

PREFIXES = {"vit": "vit.", "dinov2": "dinov2."}
"""By `model_type`, the prefix of the model's tensors in files of a model with a head."""


def transformers(config: DINOConfig) -> list[Rule]:
    """Returns the rows for names without the prefix. What is of a head or of another training is left out."""
    layer, block = "encoder.layer.{i}", "blocks.{i}"
    return [
        Rule("embeddings.cls_token", "class_token"),
        Rule("embeddings.position_embeddings", "position_embedding"),
        Rule("embeddings.patch_embeddings.projection.weight", "patch_embedding.kernel", CONV),
        Rule("embeddings.patch_embeddings.projection.bias", "patch_embedding.bias"),
        *linear(f"{layer}.attention.attention.query", f"{block}.attention.q"),
        *linear(f"{layer}.attention.attention.key", f"{block}.attention.k"),
        *linear(f"{layer}.attention.attention.value", f"{block}.attention.v"),
        *linear(f"{layer}.attention.output.dense", f"{block}.attention.out"),
        *(_dinov2(layer, block) if config.has_layer_scale else _dino(layer, block)),
        *norm("layernorm", "final_norm"),
        Rule("embeddings.mask_token", ()),
        Rule("pooler.dense.{rest}", ()),
        Rule("classifier.{rest}", ()),
        Rule("decoder.{rest}", ()),
    ]


def _dino(layer: str, block: str) -> list[Rule]:
    return [
        *norm(f"{layer}.layernorm_before", f"{block}.attention_norm"),
        *norm(f"{layer}.layernorm_after", f"{block}.mlp_norm"),
        *linear(f"{layer}.intermediate.dense", f"{block}.up"),
        *linear(f"{layer}.output.dense", f"{block}.down"),
    ]


def _dinov2(layer: str, block: str) -> list[Rule]:
    return [
        *norm(f"{layer}.norm1", f"{block}.attention_norm"),
        Rule(f"{layer}.layer_scale1.lambda1", f"{block}.attention_scale"),
        *norm(f"{layer}.norm2", f"{block}.mlp_norm"),
        *linear(f"{layer}.mlp.fc1", f"{block}.up"),
        *linear(f"{layer}.mlp.fc2", f"{block}.down"),
        Rule(f"{layer}.layer_scale2.lambda1", f"{block}.mlp_scale"),
    ]
