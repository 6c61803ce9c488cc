"""Configurations of published checkpoints, for plans, which need shapes but no weights.

Only the keys that affect shapes or the computation, and that differ from the libraries' defaults, are listed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from seg4diff_jax.convert.components import COMPONENTS, parse_config
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.readers import Source
from seg4diff_jax.convert.sources.open import MARKERS, open_source

_SD3 = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "sample_size": 128, "attention_head_dim": 64}
_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd3-medium": {**_SD3, **_MEDIUM, "pos_embed_max_size": 192},
    "sd3.5-medium": {
        **_SD3,
        **_MEDIUM,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": list(range(13)),
    },
    "sd3.5-large": {
        **_SD3,
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}
HUB_IDS = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5-large",
}
OTHERS: dict[str, dict[str, Any]] = {
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 16,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "vocab_size": 49408,
        "hidden_act": "gelu",
        "eos_token_id": 2,
    },
    "text_encoder_3": {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
}
"""Configurations of the components, other than the transformer, that all published SD3 checkpoints share."""


def describe(model: str) -> Source:
    """Returns a checkpoint source whose weights need not exist.

    Args:
      model: `miniature`, a name or Hub id of a published checkpoint, a directory with a checkpoint, or a directory with
        at least `transformer/config.json`. Components that are missing there are taken from the published SD3.

    Raises:
      CheckpointError: `model` is none of these, or a configuration is not implemented.
    """
    if (name := HUB_IDS.get(model, model)) in TRANSFORMERS:
        return _described(model, {"transformer": TRANSFORMERS[name]})
    directory = Path(model).expanduser()
    if model == "miniature" or any((directory / marker).is_file() for marker in MARKERS) or directory.is_file():
        return open_source(model)
    if not (directory / "transformer" / "config.json").is_file():
        raise CheckpointError(
            f"{model}: expected one of {', '.join((*TRANSFORMERS, 'miniature', *HUB_IDS))}, or a directory with "
            "transformer/config.json; no weights are needed"
        )
    found = {name: directory / name / "config.json" for name in COMPONENTS}
    return _described(model, {name: read_json(file) for name, file in found.items() if file.is_file()})


def _described(origin: str, configs: dict[str, dict[str, Any]]) -> Source:
    def refuse(name: str) -> NoReturn:
        raise CheckpointError(f"{origin} is described by its configurations alone: its {name} has no weights")

    whole = {name: configs.get(name, OTHERS.get(name, {})) for name in COMPONENTS}
    for name, config in whole.items():
        parse_config(name, config)
    return Source(origin, whole, refuse)
