"""Name tables of T5's encoder: transformers' T5EncoderModel, Stability's single files, and llama.cpp's GGUF files.

The `text_encoders.t5xxl.transformer.` part of single files keeps transformers' names.
"""

from __future__ import annotations

from seg4diff_jax.convert.names import LINEAR, Rule
from seg4diff_jax.models.t5 import T5Config


def diffusers(config: T5Config) -> list[Rule]:
    layer, block = "encoder.block.{i}.layer", "blocks.{i}"
    return [
        # One matrix has two names. transformers saves the first alone; single files have both, or either. If the two
        # differ, transformers 5.24 computes with the second. Such files are refused.
        Rule(("shared.weight", "encoder.embed_tokens.weight"), "token_embedding.embedding"),
        Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "position_bias.embedding"),
        Rule(f"{layer}.0.layer_norm.weight", f"{block}.attention_norm.scale"),
        *(Rule(f"{layer}.0.SelfAttention.{name}.weight", f"{block}.attention.{name}.kernel", LINEAR) for name in "qkv"),
        Rule(f"{layer}.0.SelfAttention.o.weight", f"{block}.attention.out.kernel", LINEAR),
        Rule(f"{layer}.1.layer_norm.weight", f"{block}.mlp_norm.scale"),
        Rule(f"{layer}.1.DenseReluDense.wi_0.weight", f"{block}.gate.kernel", LINEAR),
        Rule(f"{layer}.1.DenseReluDense.wi_1.weight", f"{block}.up.kernel", LINEAR),
        Rule(f"{layer}.1.DenseReluDense.wo.weight", f"{block}.down.kernel", LINEAR),
        Rule("encoder.final_layer_norm.weight", "final_norm.scale"),
        Rule("decoder.{rest}", ()),  # in files of a whole T5, of which only the encoder is read
        Rule("lm_head.weight", ()),
    ]


def stability(config: T5Config) -> list[Rule]:
    return [*diffusers(config), Rule("logit_scale", ())]


def gguf(config: T5Config) -> list[Rule]:
    layer, block = "enc.blk.{i}", "blocks.{i}"
    return [
        Rule("token_embd.weight", "token_embedding.embedding"),
        Rule("enc.blk.0.attn_rel_b.weight", "position_bias.embedding"),
        Rule(f"{layer}.attn_norm.weight", f"{block}.attention_norm.scale"),
        *(Rule(f"{layer}.attn_{name}.weight", f"{block}.attention.{name}.kernel", LINEAR) for name in "qkv"),
        Rule(f"{layer}.attn_o.weight", f"{block}.attention.out.kernel", LINEAR),
        Rule(f"{layer}.ffn_norm.weight", f"{block}.mlp_norm.scale"),
        Rule(f"{layer}.ffn_gate.weight", f"{block}.gate.kernel", LINEAR),
        Rule(f"{layer}.ffn_up.weight", f"{block}.up.kernel", LINEAR),
        Rule(f"{layer}.ffn_down.weight", f"{block}.down.kernel", LINEAR),
        Rule("enc.output_norm.weight", "final_norm.scale"),
    ]
