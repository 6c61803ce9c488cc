"""One component of any checkpoint as a model in memory, converted on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from convert.assemble import assemble
from convert.components import abstract_model
from convert.layout import contiguous
from convert.names import parameter_shapes
from convert.readers import Source, usual_dtype
from convert.sources import open_source


def load_component(
    source: Source | str | Path,
    name: str,
    *,
    dtype: Any = None,
    depth: int | None = None,
    shardings: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> Any:
    """A component with its parameters.

    Args:
      source: opened, or whatever `open_source` opens.
      name: `transformer`, `vae`, `text_encoder`, `text_encoder_2` or `text_encoder_3`.
      dtype: of the parameters and of the computation; default: what the checkpoint holds.
      depth: of the transformer, load only the first that many blocks: the bytes of the others are not read, their
        names and shapes are checked all the same.
      shardings: parameter path and shape to its sharding; default: the default device.

    Raises:
      CheckpointError: the checkpoint is damaged, lacks the component or does not match its own configuration.
    """
    opened = source if isinstance(source, Source) else open_source(source, components=[name])
    component = opened.component(name)
    component.check()
    cast = usual_dtype(component) if dtype is None else jnp.dtype(dtype)
    model = abstract_model(name, component.config, cast, depth)
    wanted = parameter_shapes(model)
    tensors = ((name, contiguous(array, cast)) for name, array in component.parameters(wanted))
    return assemble(model, tensors, dtype=cast, shardings=shardings)
