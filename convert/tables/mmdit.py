"""Name tables of MM-DiT: diffusers' SD3Transformer2DModel, and `model.diffusion_model.` in Stability's single files."""

from __future__ import annotations

import numpy as np

from seg4diff_jax.convert.names import CONV, COPY, LINEAR, SWAPPED, SWAPPED_LINEAR, Rule, Transform
from seg4diff_jax.models.sd3.model import MMDiTConfig


def _table(size: int) -> Transform:
    """Returns the transform of the positional table: [1, rows * columns, width] to [rows, columns, width]."""
    return Transform(
        lambda tensor: (tensor.reshape(size, size, -1) if tensor.ndim == 3 and tensor.shape[1] == size**2 else tensor,),
        lambda arrays: np.reshape(arrays[0], (1, size**2, -1)),
    )


def _linear(source: str, target: str | tuple[str, ...], swapped: bool = False) -> list[Rule]:
    """Returns the rows of a linear layer's weight and bias; several targets are fused along the outputs."""
    names = (target,) if isinstance(target, str) else target
    parts = len(names)
    kernel, bias = (SWAPPED_LINEAR, SWAPPED) if swapped else (LINEAR, COPY)
    return [
        Rule(f"{source}.weight", tuple(f"{n}.kernel" for n in names), kernel if parts == 1 else kernel.split(parts)),
        Rule(f"{source}.bias", tuple(f"{n}.bias" for n in names), bias if parts == 1 else bias.split(parts)),
    ]


def _rows(pairs: list[tuple[str, str | tuple[str, ...]]]) -> list[Rule]:
    return [rule for source, target in pairs for rule in _linear(source, target)]


def diffusers(config: MMDiTConfig) -> list[Rule]:
    block, last = "transformer_blocks.{i}", config.num_layers - 1
    image, text, dual = "blocks.{i}.image", "blocks.{i}.text", "blocks.{i}.image.dual_attention"
    rules = [
        Rule("pos_embed.pos_embed", "pos_embed", _table(config.pos_embed_max_size)),
        Rule("pos_embed.proj.weight", "patch_embed.kernel", CONV),
        Rule("pos_embed.proj.bias", "patch_embed.bias"),
    ]
    rules += _rows(
        [
            ("time_text_embed.timestep_embedder.linear_1", "time_embed.up"),
            ("time_text_embed.timestep_embedder.linear_2", "time_embed.down"),
            ("time_text_embed.text_embedder.linear_1", "pooled_embed.up"),
            ("time_text_embed.text_embedder.linear_2", "pooled_embed.down"),
            ("context_embedder", "context_embed"),
            (f"{block}.norm1.linear", f"{image}.modulation"),
            (f"{block}.attn.to_q", f"{image}.attention.q"),
            (f"{block}.attn.to_k", f"{image}.attention.k"),
            (f"{block}.attn.to_v", f"{image}.attention.v"),
            (f"{block}.attn.to_out.0", f"{image}.attention.out"),
            (f"{block}.attn.add_q_proj", f"{text}.attention.q"),
            (f"{block}.attn.add_k_proj", f"{text}.attention.k"),
            (f"{block}.attn.add_v_proj", f"{text}.attention.v"),
            (f"{block}.attn.to_add_out", f"{text}.attention.out"),
            (f"{block}.attn2.to_q", f"{dual}.q"),
            (f"{block}.attn2.to_k", f"{dual}.k"),
            (f"{block}.attn2.to_v", f"{dual}.v"),
            (f"{block}.attn2.to_out.0", f"{dual}.out"),
            (f"{block}.ff.net.0.proj", f"{image}.mlp.up"),
            (f"{block}.ff.net.2", f"{image}.mlp.down"),
            (f"{block}.ff_context.net.0.proj", f"{text}.mlp.up"),
            (f"{block}.ff_context.net.2", f"{text}.mlp.down"),
            ("proj_out", "proj_out"),
        ]
    )
    rules += [
        Rule(f"{block}.attn.norm_q.weight", f"{image}.attention.q_norm.scale"),
        Rule(f"{block}.attn.norm_k.weight", f"{image}.attention.k_norm.scale"),
        Rule(f"{block}.attn.norm_added_q.weight", f"{text}.attention.q_norm.scale"),
        Rule(f"{block}.attn.norm_added_k.weight", f"{text}.attention.k_norm.scale"),
        Rule(f"{block}.attn2.norm_q.weight", f"{dual}.q_norm.scale"),
        Rule(f"{block}.attn2.norm_k.weight", f"{dual}.k_norm.scale"),
    ]
    # Where a modulation has no gate, diffusers puts the scale before the shift; we never do.
    rules += _linear("norm_out.linear", "norm_out", swapped=True)
    rules += [
        rule
        for i in range(config.num_layers)
        for rule in _linear(
            f"transformer_blocks.{i}.norm1_context.linear", f"blocks.{i}.text.modulation", swapped=i == last
        )
    ]
    return rules


def stability(config: MMDiTConfig) -> list[Rule]:
    x, context = "joint_blocks.{i}.x_block", "joint_blocks.{i}.context_block"
    image, text, dual = "blocks.{i}.image", "blocks.{i}.text", "blocks.{i}.image.dual_attention"

    def qkv(prefix: str) -> tuple[str, ...]:
        return tuple(f"{prefix}.{name}" for name in "qkv")

    rules = [
        Rule("pos_embed", "pos_embed", _table(config.pos_embed_max_size)),
        Rule("x_embedder.proj.weight", "patch_embed.kernel", CONV),
        Rule("x_embedder.proj.bias", "patch_embed.bias"),
    ]
    rules += _rows(
        [
            ("t_embedder.mlp.0", "time_embed.up"),
            ("t_embedder.mlp.2", "time_embed.down"),
            ("y_embedder.mlp.0", "pooled_embed.up"),
            ("y_embedder.mlp.2", "pooled_embed.down"),
            ("context_embedder", "context_embed"),
            (f"{x}.adaLN_modulation.1", f"{image}.modulation"),
            (f"{x}.attn.qkv", qkv(f"{image}.attention")),
            (f"{x}.attn.proj", f"{image}.attention.out"),
            (f"{x}.attn2.qkv", qkv(dual)),
            (f"{x}.attn2.proj", f"{dual}.out"),
            (f"{x}.mlp.fc1", f"{image}.mlp.up"),
            (f"{x}.mlp.fc2", f"{image}.mlp.down"),
            (f"{context}.adaLN_modulation.1", f"{text}.modulation"),
            (f"{context}.attn.qkv", qkv(f"{text}.attention")),
            (f"{context}.attn.proj", f"{text}.attention.out"),
            (f"{context}.mlp.fc1", f"{text}.mlp.up"),
            (f"{context}.mlp.fc2", f"{text}.mlp.down"),
            ("final_layer.adaLN_modulation.1", "norm_out"),
            ("final_layer.linear", "proj_out"),
        ]
    )
    rules += [
        Rule(f"{source}.ln_{letter}.weight", f"{target}.{letter}_norm.scale")
        for source, target in (
            (f"{x}.attn", f"{image}.attention"),
            (f"{x}.attn2", dual),
            (f"{context}.attn", f"{text}.attention"),
        )
        for letter in "qk"
    ]
    return rules
