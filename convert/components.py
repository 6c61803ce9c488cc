"""The components of a checkpoint: their configurations, their abstract models, and the expert block and noise level."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from flax import nnx

from seg4diff_jax.convert.assemble import abstract
from seg4diff_jax.convert.configurations import PUBLISHED, check_values
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.families import SD3, Architecture
from seg4diff_jax.convert.names import Shape, parameter_shapes
from seg4diff_jax.models.sd3.model import MMDiTConfig
from seg4diff_jax.models.stacked_layers import Layered
from seg4diff_jax.quoting import quoted

COMPONENTS = SD3.components
"""The components of SD3, the only family so far."""
PART_SIZE = 1 << 26
"""Most numbers in one part of a checkpoint: 128 MB in 16 bits, so that a few parts in memory do not matter."""


def tokenizers_of(components: list[str]) -> list[str]:
    return [tokenizer[0] for name in components if (tokenizer := COMPONENTS[name].tokenizer)]


def parse_config(name: str, config: dict[str, Any]) -> Any:
    """Returns a component's typed configuration. Raises CheckpointError, which names the component and the key."""
    kind = COMPONENTS[name].config
    try:
        check_values(kind, config, PUBLISHED if kind is MMDiTConfig else {})
        return kind.from_json(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: config.json describes a model that is not implemented: {error}") from None


def abstract_model(name: str, config: dict[str, Any], dtype: Any = jnp.float32, depth: int | None = None) -> Layered:
    """Returns a component's abstract model. With `depth` the transformer has only this many blocks, from the first."""
    return nnx.clone(_abstract_model(name, parse_config(name, config), jnp.dtype(dtype), depth))


@lru_cache
def _abstract_model(name: str, config: Any, dtype: jnp.dtype, depth: int | None) -> Layered:
    """Makes each model once: opening, checking and loading a checkpoint all need it, and tracing takes up to 1 s."""
    options = {} if depth is None else {"depth": depth}
    make = COMPONENTS[name].model
    return abstract(lambda rngs: make(config, dtype=dtype, param_dtype=dtype, rngs=rngs, **options))


def component_shapes(name: str, config: dict[str, Any]) -> dict[str, Shape]:
    """Returns the shape of every parameter of a component by our per-layer name."""
    return dict(_shapes(name, parse_config(name, config))[0])


@lru_cache
def _shapes(name: str, config: Any) -> tuple[dict[str, Shape], set[str]]:
    """Returns the shapes of a component's parameters, and the prefixes of its layers. Every file of it needs them."""
    model = _abstract_model(name, config, jnp.dtype(jnp.float32), None)
    layers = {f"{stack.layers}.{i}" for stack in model.layer_stacks for i in range(stack.start, stack.stop)}
    return parameter_shapes(model), layers


def part_of(name: str, config: dict[str, Any]) -> dict[str, str]:
    """Returns the part of the checkpoint that each parameter of a component belongs to.

    A part is a layer, as in `blocks.7`, or `base`, which holds all else. Each part has at most PART_SIZE numbers,
    unless it is a single parameter. The further pieces of a large layer are `blocks.7-1`, `blocks.7-2`.
    """
    shapes, layers = _shapes(name, parse_config(name, config))
    parts: dict[str, str] = {}
    pieces: dict[str, int] = {}
    filled: dict[str, int] = {}
    for parameter, shape in shapes.items():
        prefix = ".".join(parameter.split(".", 2)[:2])
        owner, size = (prefix if prefix in layers else "base"), math.prod(shape)
        if filled.get(owner, 0) and filled[owner] + size > PART_SIZE:
            pieces[owner], filled[owner] = pieces.get(owner, 0) + 1, 0
        filled[owner] = filled.get(owner, 0) + size
        parts[parameter] = f"{owner}-{pieces[owner]}" if owner in pieces else owner
    return parts


def expert_block(transformer_config: dict[str, Any]) -> int | None:
    """Returns the block whose attention segments best: the configuration's, or the one published for its architecture.

    Returns None if no block is known. Raises CheckpointError when the configuration names a block that does not exist.
    """
    config = parse_config("transformer", transformer_config)
    if "expert_block" in transformer_config:
        return checked_block(transformer_config["expert_block"], config.num_layers, "transformer: config.json")
    return SD3.expert_blocks.get(
        Architecture(config.num_layers, config.width, config.dual_attention_layers, config.qk_norm)
    )


def checked_block(block: Any, num_layers: int, where: str) -> int | None:
    """Returns the expert block of a file. Raises CheckpointError, which names the file, when there is no such block."""
    if block is None or (type(block) is int and 0 <= block < num_layers):
        return block
    raise CheckpointError(
        f"{where}: expert_block is {quoted(block)}; expected an integer from 0 to {num_layers - 1}, or null"
    )


def expert_step(transformer_config: dict[str, Any]) -> int:
    """Returns the noise level at which the expert block segments best: the configuration's, or else the paper's.

    Raises CheckpointError when the configuration's noise level is not an integer from 1 to 28.
    """
    step = transformer_config.get("expert_step", SD3.expert_step)
    if type(step) is not int or not 1 <= step <= 28:
        raise CheckpointError(
            f"transformer: config.json: expert_step is {quoted(step)}; expected an integer from 1 to 28"
        )
    return step


def trained_size(transformer_config: dict[str, Any], vae_config: dict[str, Any] | None) -> int:
    """Returns the side, in pixels, of the square images that the transformer was trained for."""
    halvings = len(parse_config("vae", vae_config).block_out_channels) - 1 if vae_config else 3
    return parse_config("transformer", transformer_config).sample_size * 2**halvings
