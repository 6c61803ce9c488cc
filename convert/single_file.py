"""Stability's single files hold tensors only: what each component's configuration must have been.

Widths and depths follow from shapes. What shapes do not tell (head dimension, activations, the VAE's scaling) is the
same in every published SD3 and SD3.5 and is taken from there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert.components import COMPONENTS
from convert.errors import CheckpointError
from convert.names import Shape
from convert.readers import Source, TorchComponent
from convert.safetensors_stream import TensorInfo, read_header

HEAD_DIM = 64
"""Of the transformer and of both CLIPs."""
REDUNDANT = re.compile(r"text_encoders\.(clip_l|clip_g|t5xxl)\.(logit_scale|transformer\.logit_scale)")
"""Tensors outside every component, left from the text encoders' own training."""

Shapes = Mapping[str, Shape]


class _Missing(KeyError):
    pass


class _Known(dict[str, Shape]):
    def __missing__(self, name: str) -> Shape:
        raise _Missing(name)


def open_single_file(path: Path) -> Source:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: only safetensors files are read: pickled files can run code; convert it with "
            "safetensors.torch.save_file first"
        )
    tensors: dict[str, dict[str, TensorInfo]] = {}
    surplus = []
    for name, info in read_header(path).items():
        owner = next((key for key, component in COMPONENTS.items() if name.startswith(component.prefix)), None)
        if owner is not None:
            tensors.setdefault(owner, {})[name.removeprefix(COMPONENTS[owner].prefix)] = info
        elif not REDUNDANT.fullmatch(name):
            surplus.append(name)
    if not tensors:
        raise CheckpointError(
            f"{path}: not an SD3 checkpoint: no tensor's name begins with "
            + ", ".join(component.prefix for component in COMPONENTS.values())
        )
    if surplus:
        raise CheckpointError(f"{path}: {len(surplus)} surplus tensors of no component:\n  " + "\n  ".join(surplus))
    configs = {
        name: infer_config(name, {key: info.shape for key, info in tensors[name].items()}, COMPONENTS[name].prefix)
        for name in COMPONENTS
        if name in tensors
    }
    return Source(
        str(path),
        configs,
        lambda name: TorchComponent(
            name, configs[name], "stability", tensors[name], str(path), COMPONENTS[name].prefix
        ),
    )


def infer_config(name: str, shapes: Shapes, prefix: str = "") -> dict[str, Any]:
    """The `config.json` of a component.

    Args:
      name: as in diffusers' layout.
      shapes: of the component's tensors, without their common prefix.
      prefix: that prefix, for messages.

    Raises CheckpointError naming a tensor that is needed and absent.
    """
    try:
        return _INFER[name](_Known(shapes))
    except _Missing as error:
        raise CheckpointError(
            f"{name}: missing tensor {prefix}{error.args[0]}, from which its configuration follows"
        ) from None


def _numbers(shapes: Shapes, pattern: str) -> list[int]:
    """The distinct numbers in place of `{i}` among the names that begin with `pattern`, ascending."""
    regex = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
    return sorted({int(found[1]) for name in shapes if (found := regex.match(name))})


def _transformer(shapes: Shapes) -> dict[str, Any]:
    width, joint = shapes["context_embedder.weight"]
    patches = shapes["x_embedder.proj.weight"]
    outputs = shapes["final_layer.linear.weight"][0]
    normalised = any(name.endswith("attn.ln_q.weight") for name in shapes)
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patches[-1],
        "in_channels": patches[1],
        "out_channels": outputs // patches[-1] ** 2,
        "num_layers": len(_numbers(shapes, "joint_blocks.{i}.")),
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "caption_projection_dim": width,
        "joint_attention_dim": joint,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "qk_norm": "rms_norm" if normalised else None,
        "dual_attention_layers": _numbers(shapes, "joint_blocks.{i}.x_block.attn2."),
    }


def _vae(shapes: Shapes) -> dict[str, Any]:
    levels = _numbers(shapes, "encoder.down.{i}.")
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in levels],
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": len(_numbers(shapes, "encoder.down.0.block.{i}.")),
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "force_upcast": True,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _clip(activation: str, projected: bool) -> Callable[[Shapes], dict[str, Any]]:
    """`projected`: False for CLIP-L, whose pooled state single files leave as it is."""

    def infer(shapes: Shapes) -> dict[str, Any]:
        vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
        return {
            "architectures": ["CLIPTextModelWithProjection"],
            "model_type": "clip_text_model",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": len(_numbers(shapes, "text_model.encoder.layers.{i}.")),
            "num_attention_heads": width // HEAD_DIM,
            "projection_dim": shapes["text_projection.weight"][0] if projected else width,
            "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        }

    return infer


def _t5(shapes: Shapes) -> dict[str, Any]:
    vocabulary, width = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wo.weight"][1],
        "num_heads": heads,
        "num_layers": len(_numbers(shapes, "encoder.block.{i}.")),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
    }


_INFER: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "transformer": _transformer,
    "vae": _vae,
    "text_encoder": _clip("quick_gelu", projected=False),
    "text_encoder_2": _clip("gelu", projected=True),
    "text_encoder_3": _t5,
}
