"""The parts of an SD3 checkpoint: which model each one is, and under which names its tensors come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from convert.assemble import abstract
from convert.configurations import PUBLISHED, check_values
from convert.errors import CheckpointError
from convert.files import shown
from convert.names import Rule
from convert.tables import clip as clip_table
from convert.tables import mmdit as mmdit_table
from convert.tables import t5 as t5_table
from convert.tables import vae as vae_table
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.mmdit import MMDiT, MMDiTConfig
from seg4diff_jax.models.stack import Layered
from seg4diff_jax.models.t5 import T5Config, T5Encoder
from seg4diff_jax.models.vae import VAE, VAEConfig

Naming = Literal["diffusers", "stability", "gguf"]
"""Whose names tensors have: diffusers' and transformers', Stability's, or, for T5, llama.cpp's."""


class Component(NamedTuple):
    """One part of a checkpoint.

    `weights` is the name of its weight file in diffusers' layout, without variant, shard and suffix; `prefix` is
    what Stability's single files put before its tensors; `tokenizer` is the folder of the tokenizer it needs.
    """

    config: Any
    model: Callable[..., Any]
    rules: Mapping[Naming, Callable[[Any], list[Rule]]]
    weights: str
    prefix: str
    tokenizer: str | None = None


def _rules(table: Any) -> dict[Naming, Callable[[Any], list[Rule]]]:
    return {"diffusers": table.diffusers, "stability": table.stability}


_clip = (CLIPTextConfig, CLIPText, _rules(clip_table), "model")
COMPONENTS: dict[str, Component] = {
    "transformer": Component(
        MMDiTConfig, MMDiT, _rules(mmdit_table), "diffusion_pytorch_model", "model.diffusion_model."
    ),
    "vae": Component(VAEConfig, VAE, _rules(vae_table), "diffusion_pytorch_model", "first_stage_model."),
    "text_encoder": Component(*_clip, "text_encoders.clip_l.transformer.", "tokenizer"),
    "text_encoder_2": Component(*_clip, "text_encoders.clip_g.transformer.", "tokenizer_2"),
    "text_encoder_3": Component(
        T5Config,
        T5Encoder,
        {**_rules(t5_table), "gguf": t5_table.gguf},
        "model",
        "text_encoders.t5xxl.transformer.",
        "tokenizer_3",
    ),
}
"""In the order in which they are converted; the names are diffusers'."""
CLASSES = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
"""diffusers' classes of the components that it saves."""


def tokenizers_of(components: list[str]) -> list[str]:
    return [folder for name in components if (folder := COMPONENTS[name].tokenizer)]


def parse_config(name: str, config: dict[str, Any]) -> Any:
    """The component's typed configuration. Raises CheckpointError naming the component and the key."""
    kind = COMPONENTS[name].config
    try:
        check_values(kind, config, PUBLISHED if kind is MMDiTConfig else {})
        return kind.from_json(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: config.json describes a model that is not implemented: {error}") from None


def abstract_model(name: str, config: dict[str, Any], dtype: Any = jnp.float32, depth: int | None = None) -> Layered:
    """The component's model without its numbers. `depth`: of the transformer, only the first that many blocks."""
    return nnx.clone(_abstract_model(name, parse_config(name, config), jnp.dtype(dtype), depth))


@lru_cache
def _abstract_model(name: str, config: Any, dtype: jnp.dtype, depth: int | None) -> Layered:
    """Kept: each step of opening, checking and loading a checkpoint asks for it, and tracing takes up to a second."""
    options = {} if depth is None else {"depth": depth}
    make = COMPONENTS[name].model
    return abstract(lambda rngs: make(config, dtype=dtype, param_dtype=dtype, rngs=rngs, **options))


class Architecture(NamedTuple):
    """What tells the published transformers apart."""

    num_layers: int
    width: int
    dual_attention_layers: tuple[int, ...]
    qk_norm: bool


EXPERT_BLOCKS: dict[Architecture, int] = {
    Architecture(24, 1536, (), qk_norm=False): 9,
    Architecture(24, 1536, tuple(range(13)), qk_norm=True): 9,
}
"""The block whose attention segments best, by architecture: Seg4Diff's finding for SD3-medium, whose "9th block" is
number 9 counted from 0, and for SD3.5-medium (appendix C). For SD3.5-large nobody has published one."""


def expert_block(transformer_config: dict[str, Any]) -> int | None:
    """The block whose attention segments best: what the configuration says, or what is known of its architecture.

    Raises CheckpointError when the configuration says something that is no block of it.
    """
    config = parse_config("transformer", transformer_config)
    if "expert_block" in transformer_config:
        return checked_block(transformer_config["expert_block"], config.num_layers, "transformer: config.json")
    return EXPERT_BLOCKS.get(
        Architecture(config.num_layers, config.width, config.dual_attention_layers, config.qk_norm)
    )


def checked_block(block: Any, num_layers: int, where: str) -> int | None:
    """The block that a file calls the expert. Raises CheckpointError, naming the file, when there is no such block."""
    if block is None or (type(block) is int and 0 <= block < num_layers):
        return block
    raise CheckpointError(
        f"{where}: expert_block is {shown(block)}; expected an integer from 0 to {num_layers - 1}, or null"
    )


EXPERT_STEP = 8
"""The noise level at which Seg4Diff found SD3-medium's attention to segment best, counted from the clean end of 28."""


def expert_step(transformer_config: dict[str, Any]) -> int:
    """The noise level at which the expert block segments best: what the configuration says, or the paper's.

    Raises CheckpointError when the configuration says something that is no step.
    """
    step = transformer_config.get("expert_step", EXPERT_STEP)
    if type(step) is not int or not 1 <= step <= 28:
        raise CheckpointError(
            f"transformer: config.json: expert_step is {shown(step)}; expected an integer from 1 to 28"
        )
    return step


def trained_size(transformer_config: dict[str, Any], vae_config: dict[str, Any] | None) -> int:
    """Side, in pixels, of the square images that the transformer was trained for."""
    halvings = len(parse_config("vae", vae_config).block_out_channels) - 1 if vae_config else 3
    return parse_config("transformer", transformer_config).sample_size * 2**halvings
