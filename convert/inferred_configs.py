"""Infers each component's configuration from the tensors' shapes, for files that hold tensors only.

Widths and depths follow from shapes. The size of attention heads follows from the norms of q, if there are any. Shapes
do not show the head size of other models, activations, the VAE's groups and scaling, or the size of images. These
values are the same in every published SD3 and SD3.5, and are taken from there. Shapes that contradict them are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from statistics import mode
from typing import Any, NamedTuple

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.families import Naming
from seg4diff_jax.convert.names import Shape

HEAD_DIM = 64
"""Size of attention heads in both CLIPs, and in a transformer without norms on q."""
GROUPS = 32
"""Groups of the VAE's norms."""
UNSAID = "which all published ones have, and no tensor says otherwise"
GIVE_CONFIG = "give the model in diffusers' layout, whose config.json says more"

Shapes = Mapping[str, Shape]


class _Missing(KeyError):
    pass


class _Known(dict[str, Shape]):
    """Shapes by name; `asked` is the name that was looked up last."""

    asked = ""

    def __getitem__(self, name: str) -> Shape:
        self.asked = name
        shape = super().__getitem__(name)
        if 0 in shape:
            raise ValueError(f"{name} is empty")
        return shape

    def __missing__(self, name: str) -> Shape:
        raise _Missing(name)


def infer_config(name: str, shapes: Shapes, prefix: str = "", naming: Naming = "stability") -> dict[str, Any]:
    """Returns the `config.json` of a component.

    Args:
      name: the component's name in diffusers' layout.
      shapes: shapes of the component's tensors, by name without the common prefix.
      prefix: the common prefix, for messages.
      naming: who named the tensors.

    Raises CheckpointError when a tensor that is needed is absent or has an impossible shape, which the message names,
    or when one of the assumed numbers does not fit.
    """
    known = _Known(shapes)
    if (name, naming) not in _INFER:
        raise CheckpointError(f"{name}: its tensors have the names of another component, such as {next(iter(shapes))}")
    try:
        return _INFER[name, naming](known)
    except _Missing as error:
        raise CheckpointError(
            f"{name}: missing tensor {prefix}{error.args[0]}, from which its configuration follows"
        ) from None
    except CheckpointError:  # a ValueError too, whose message says more than the one below
        raise
    except (ValueError, IndexError, ZeroDivisionError):
        raise CheckpointError(
            f"{name}: no configuration follows from the shape {list(shapes[known.asked])} of {prefix}{known.asked}"
        ) from None


def _heads(name: str, width: int, size: int = HEAD_DIM, told_by: str | None = None) -> int:
    """Returns the number of attention heads of `size`. Raises CheckpointError when it is not a whole number."""
    if width % size:
        why = f"as {told_by} says" if told_by else UNSAID
        raise CheckpointError(
            f"{name}: {width} features are no whole number of attention heads of {size}, {why}: {GIVE_CONFIG}"
        )
    return width // size


def _numbers(shapes: Shapes, pattern: str) -> set[int]:
    """Returns the numbers that stand for `{i}` in the names that begin with `pattern`."""
    regex = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d{1,9})"))
    return {int(found[1]) for name in shapes if (found := regex.match(name))}


def _count(shapes: Shapes, pattern: str) -> int:
    """Returns the number of layers, numbered from 0. A number far beyond the others is surplus and is not counted."""
    numbers = _numbers(shapes, pattern)
    return max((number for number in numbers if number < 2 * len(numbers)), default=-1) + 1


class _TransformerNames(NamedTuple):
    """Names of the tensors whose shapes give a transformer's sizes."""

    patches: str
    pooled: str
    table: str
    outputs: str
    block: str
    dual: str
    norm: str


_TRANSFORMER_NAMES: dict[Naming, _TransformerNames] = {
    "stability": _TransformerNames(
        "x_embedder.proj.weight",
        "y_embedder.mlp.0.weight",
        "pos_embed",
        "final_layer.linear.weight",
        "joint_blocks.{i}.",
        "joint_blocks.{i}.x_block.attn2.",
        "attn.ln_q.weight",
    ),
    "diffusers": _TransformerNames(
        "pos_embed.proj.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "pos_embed.pos_embed",
        "proj_out.weight",
        "transformer_blocks.{i}.",
        "transformer_blocks.{i}.attn2.",
        "attn.norm_q.weight",
    ),
}


def _transformer(naming: Naming) -> Callable[[Shapes], dict[str, Any]]:
    names = _TRANSFORMER_NAMES[naming]

    def infer(shapes: Shapes) -> dict[str, Any]:
        width, joint = shapes["context_embedder.weight"]
        _, channels, _, patch = shapes[names.patches]
        layers = _count(shapes, names.block)
        norms = [name for name in shapes if name.endswith(names.norm)]
        size = mode([shapes[name][0] for name in norms]) if norms else HEAD_DIM
        return {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "patch_size": patch,
            "in_channels": channels,
            "out_channels": shapes[names.outputs][0] // patch**2,
            "num_layers": layers,
            "num_attention_heads": _heads("transformer", width, size, norms[0] if norms else None),
            "attention_head_dim": size,
            "caption_projection_dim": width,
            "joint_attention_dim": joint,
            "pooled_projection_dim": shapes[names.pooled][1],
            "pos_embed_max_size": math.isqrt(shapes[names.table][1]),
            "qk_norm": "rms_norm" if norms else None,
            "dual_attention_layers": sorted(i for i in _numbers(shapes, names.dual) if i < layers),
        }

    return infer


class _VAENames(NamedTuple):
    """Names of the tensors whose shapes give an autoencoder's sizes."""

    level: str
    convolution: str
    block: str
    attention: str


_VAE_NAMES: dict[Naming, _VAENames] = {
    "stability": _VAENames(
        "encoder.down.{i}.", "block.0.conv1.weight", "encoder.down.0.block.{i}.", "encoder.mid.attn_1.q.weight"
    ),
    "diffusers": _VAENames(
        "encoder.down_blocks.{i}.",
        "resnets.0.conv1.weight",
        "encoder.down_blocks.0.resnets.{i}.",
        "encoder.mid_block.attentions.0.to_q.weight",
    ),
}


def _vae(naming: Naming) -> Callable[[Shapes], dict[str, Any]]:
    return partial(_infer_vae, _VAE_NAMES[naming])


def _infer_vae(names: _VAENames, shapes: Shapes) -> dict[str, Any]:
    levels = range(_count(shapes, names.level))
    channels = {name: shapes[name][0] for i in levels for name in [names.level.format(i=i) + names.convolution]}
    if odd := [name for name in channels if channels[name] % GROUPS]:
        raise CheckpointError(
            f"vae: the {channels[odd[0]]} channels of {odd[0]} do not divide into {GROUPS} groups, {UNSAID}: "
            f"{GIVE_CONFIG}"
        )
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(channels.values()),
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": _count(shapes, names.block),
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "mid_block_add_attention": names.attention in shapes,
        "norm_num_groups": GROUPS,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "force_upcast": True,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _clip(encoder: str, activation: str, projected: bool) -> Callable[[Shapes], dict[str, Any]]:
    """Returns the function that infers a CLIP's configuration.

    `projected` is False for CLIP-L, whose pooled output is not projected in single files.
    """

    def infer(shapes: Shapes) -> dict[str, Any]:
        vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
        return {
            "architectures": ["CLIPTextModelWithProjection"],
            "model_type": "clip_text_model",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": _count(shapes, "text_model.encoder.layers.{i}."),
            "num_attention_heads": _heads(encoder, width),
            "projection_dim": shapes["text_projection.weight"][0] if projected else width,
            "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        }

    return infer


class _T5Names(NamedTuple):
    """Names of the tensors whose shapes give T5's sizes. Of `embedding` the first name that is present counts."""

    embedding: tuple[str, ...]
    position_bias: str
    q: str
    down: str
    block: str


_T5_NAMES: dict[Naming, _T5Names] = {
    "stability": _T5Names(
        ("shared.weight", "encoder.embed_tokens.weight"),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.1.DenseReluDense.wo.weight",
        "encoder.block.{i}.",
    ),
    "gguf": _T5Names(
        ("token_embd.weight",),
        "enc.blk.0.attn_rel_b.weight",
        "enc.blk.0.attn_q.weight",
        "enc.blk.0.ffn_down.weight",
        "enc.blk.{i}.",
    ),
}


def _t5(naming: Naming) -> Callable[[Shapes], dict[str, Any]]:
    names = _T5_NAMES[naming]

    def infer(shapes: Shapes) -> dict[str, Any]:
        vocabulary, width = shapes[next((name for name in names.embedding if name in shapes), names.embedding[-1])]
        buckets, heads = shapes[names.position_bias]
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "vocab_size": vocabulary,
            "d_model": width,
            "d_kv": shapes[names.q][0] // heads,
            "d_ff": shapes[names.down][1],
            "num_heads": heads,
            "num_layers": _count(shapes, names.block),
            "relative_attention_num_buckets": buckets,
            "relative_attention_max_distance": 128,
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu_new",
            "is_gated_act": True,
            "layer_norm_epsilon": 1e-6,
            "tie_word_embeddings": False,
        }

    return infer


_INFER: dict[tuple[str, Naming], Callable[[Shapes], dict[str, Any]]] = {
    ("transformer", "stability"): _transformer("stability"),
    ("transformer", "diffusers"): _transformer("diffusers"),
    ("vae", "stability"): _vae("stability"),
    ("vae", "diffusers"): _vae("diffusers"),
    ("text_encoder", "stability"): _clip("text_encoder", "quick_gelu", projected=False),
    ("text_encoder_2", "stability"): _clip("text_encoder_2", "gelu", projected=True),
    ("text_encoder_3", "stability"): _t5("stability"),
    ("text_encoder_3", "gguf"): _t5("gguf"),
}
