"""Name tables of AutoencoderKL: diffusers' names, and those after `first_stage_model.` in Stability's single files.

Stability numbers the decoder's levels from fine to coarse; diffusers and we number them in the order in which they run.
"""

from __future__ import annotations

from seg4diff_jax.convert.names import CONV, CONV_AS_LINEAR, COPY, LINEAR, Rule, Transform
from seg4diff_jax.models.vae import VAEConfig


def diffusers(config: VAEConfig) -> list[Rule]:
    """Returns the rows for diffusers' `vae/diffusion_pytorch_model.safetensors`."""
    return [
        *_layer("encoder.conv_in", "encoder.conv_in", CONV),
        *_block("encoder.down_blocks.{i}.resnets.{j}", "encoder.levels.{i}.blocks.{j}", shortcut="conv_shortcut"),
        *_layer("encoder.down_blocks.{i}.downsamplers.0.conv", "encoder.levels.{i}.resample.conv", CONV),
        *_diffusers_middle("encoder"),
        *_norm("encoder.conv_norm_out", "encoder.norm_out"),
        *_layer("encoder.conv_out", "encoder.conv_out", CONV),
        *_layer("quant_conv", "quant_conv", CONV_AS_LINEAR),
        *_layer("post_quant_conv", "post_quant_conv", CONV_AS_LINEAR),
        *_layer("decoder.conv_in", "decoder.conv_in", CONV),
        *_diffusers_middle("decoder"),
        *_block("decoder.up_blocks.{i}.resnets.{j}", "decoder.levels.{i}.blocks.{j}", shortcut="conv_shortcut"),
        *_layer("decoder.up_blocks.{i}.upsamplers.0.conv", "decoder.levels.{i}.resample.conv", CONV),
        *_norm("decoder.conv_norm_out", "decoder.norm_out"),
        *_layer("decoder.conv_out", "decoder.conv_out", CONV),
    ]


def stability(config: VAEConfig) -> list[Rule]:
    """Returns the rows for Stability's `sd3_medium.safetensors` and similar files, after `first_stage_model.`."""
    rows = [
        *_layer("encoder.conv_in", "encoder.conv_in", CONV),
        *_block("encoder.down.{i}.block.{j}", "encoder.levels.{i}.blocks.{j}", shortcut="nin_shortcut"),
        *_layer("encoder.down.{i}.downsample.conv", "encoder.levels.{i}.resample.conv", CONV),
        *_stability_middle("encoder"),
        *_norm("encoder.norm_out", "encoder.norm_out"),
        *_layer("encoder.conv_out", "encoder.conv_out", CONV),
        *_layer("quant_conv", "quant_conv", CONV_AS_LINEAR),
        *_layer("post_quant_conv", "post_quant_conv", CONV_AS_LINEAR),
        *_layer("decoder.conv_in", "decoder.conv_in", CONV),
        *_stability_middle("decoder"),
        *_norm("decoder.norm_out", "decoder.norm_out"),
        *_layer("decoder.conv_out", "decoder.conv_out", CONV),
    ]
    levels = len(config.block_out_channels)
    for theirs, ours in zip(reversed(range(levels)), range(levels), strict=True):
        rows += [
            *_block(f"decoder.up.{theirs}.block.{{j}}", f"decoder.levels.{ours}.blocks.{{j}}", shortcut="nin_shortcut"),
            *_layer(f"decoder.up.{theirs}.upsample.conv", f"decoder.levels.{ours}.resample.conv", CONV),
        ]
    return rows


def _diffusers_middle(side: str) -> list[Rule]:
    theirs, ours = f"{side}.mid_block", f"{side}.middle"
    return [
        *_block(f"{theirs}.resnets.0", f"{ours}.before", shortcut="conv_shortcut"),
        *_norm(f"{theirs}.attentions.0.group_norm", f"{ours}.attention.norm"),
        *_layer(f"{theirs}.attentions.0.to_q", f"{ours}.attention.query", LINEAR),
        *_layer(f"{theirs}.attentions.0.to_k", f"{ours}.attention.key", LINEAR),
        *_layer(f"{theirs}.attentions.0.to_v", f"{ours}.attention.value", LINEAR),
        *_layer(f"{theirs}.attentions.0.to_out.0", f"{ours}.attention.out", LINEAR),
        *_block(f"{theirs}.resnets.1", f"{ours}.after", shortcut="conv_shortcut"),
    ]


def _stability_middle(side: str) -> list[Rule]:
    theirs, ours = f"{side}.mid", f"{side}.middle"
    return [
        *_block(f"{theirs}.block_1", f"{ours}.before", shortcut="nin_shortcut"),
        *_norm(f"{theirs}.attn_1.norm", f"{ours}.attention.norm"),
        *_layer(f"{theirs}.attn_1.q", f"{ours}.attention.query", CONV_AS_LINEAR),
        *_layer(f"{theirs}.attn_1.k", f"{ours}.attention.key", CONV_AS_LINEAR),
        *_layer(f"{theirs}.attn_1.v", f"{ours}.attention.value", CONV_AS_LINEAR),
        *_layer(f"{theirs}.attn_1.proj_out", f"{ours}.attention.out", CONV_AS_LINEAR),
        *_block(f"{theirs}.block_2", f"{ours}.after", shortcut="nin_shortcut"),
    ]


def _block(theirs: str, ours: str, *, shortcut: str) -> list[Rule]:
    return [
        *_norm(f"{theirs}.norm1", f"{ours}.norm1"),
        *_layer(f"{theirs}.conv1", f"{ours}.conv1", CONV),
        *_norm(f"{theirs}.norm2", f"{ours}.norm2"),
        *_layer(f"{theirs}.conv2", f"{ours}.conv2", CONV),
        *_layer(f"{theirs}.{shortcut}", f"{ours}.shortcut", CONV_AS_LINEAR),
    ]


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}.scale", COPY), Rule(f"{theirs}.bias", f"{ours}.bias", COPY)]


def _layer(theirs: str, ours: str, transform: Transform) -> list[Rule]:
    return [Rule(f"{theirs}.weight", f"{ours}.kernel", transform), Rule(f"{theirs}.bias", f"{ours}.bias", COPY)]
