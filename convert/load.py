"""Loads one component of any checkpoint as a model in memory, and converts it on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seg4diff_jax.convert.assemble import assemble
from seg4diff_jax.convert.components import abstract_model
from seg4diff_jax.convert.layout import contiguous
from seg4diff_jax.convert.names import Shape, parameter_shapes
from seg4diff_jax.convert.readers import ComponentReader, Source, usual_dtype
from seg4diff_jax.convert.sources.open import open_source

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Returns a parameter's sharding from its path and shape."""


@dataclass(frozen=True)
class Unfilled:
    """A checked component, and the abstract model that it fills. No weights have been read."""

    component: ComponentReader
    model: Any
    dtype: jnp.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the parameters take in memory."""
        return self.dtype.itemsize * sum(math.prod(shape) for shape in self._shapes.values())

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return parameter_shapes(self.model)

    def fill(self, *, shardings: Shardings | None = None, read: Callable[[int], None] = lambda count: None) -> Any:
        """Returns the model with its parameters. `read` receives each parameter's bytes, counted as in `nbytes`."""

        def tensors() -> Iterator[tuple[str, np.ndarray]]:
            for name, array in self.component.parameters(self._shapes):
                yield name, contiguous(array, self.dtype)
                read(array.size * self.dtype.itemsize)

        return assemble(self.model, tensors(), dtype=self.dtype, shardings=shardings)


def open_component(source: Source, name: str, *, dtype: Any = None, depth: int | None = None) -> Unfilled:
    """Opens and checks a component. Arguments and errors are as for `load_component`."""
    component = source.component(name)
    component.check()
    kind = jnp.dtype(usual_dtype(component) if dtype is None else dtype)
    return Unfilled(component, abstract_model(name, component.config, kind, depth), kind)


def load_component(
    source: Source | str | Path,
    name: str,
    *,
    dtype: Any = None,
    depth: int | None = None,
    shardings: Shardings | None = None,
) -> Any:
    """Returns a component's model with its parameters.

    Args:
      source: an opened checkpoint, or whatever `open_source` opens.
      name: `transformer`, `vae`, `text_encoder`, `text_encoder_2` or `text_encoder_3`.
      dtype: of the parameters and of the computation; default: what the checkpoint holds.
      depth: load only this many of the transformer's blocks, from the first. The others are not read, but their names
        and shapes are checked.
      shardings: returns a parameter's sharding from its path and shape; default: the default device.

    Raises:
      CheckpointError: the checkpoint is damaged, lacks the component or does not match its own configuration.
    """
    opened = source if isinstance(source, Source) else open_source(source, components=[name])
    return open_component(opened, name, dtype=dtype, depth=depth).fill(shardings=shardings)
