"""One component of any checkpoint as a model in memory, converted on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seg4diff_jax.convert.assemble import assemble
from seg4diff_jax.convert.components import abstract_model
from seg4diff_jax.convert.layout import contiguous
from seg4diff_jax.convert.names import parameter_shapes
from seg4diff_jax.convert.readers import ComponentReader, Source, usual_dtype
from seg4diff_jax.convert.sources.open import open_source

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Parameter path and shape to its sharding."""


@dataclass(frozen=True)
class Unfilled:
    """A component that has been found sound, and the model without numbers that it fills; no weights have been read."""

    component: ComponentReader
    model: Any
    dtype: jnp.dtype

    @property
    def nbytes(self) -> int:
        """Size of the parameters in memory."""
        return self.dtype.itemsize * sum(math.prod(shape) for shape in parameter_shapes(self.model).values())

    def fill(self, *, shardings: Shardings | None = None, read: Callable[[int], None] = lambda count: None) -> Any:
        """The model with its parameters. `read`: told the bytes, as in `nbytes`, of each one."""

        def tensors() -> Iterator[tuple[str, np.ndarray]]:
            for name, array in self.component.parameters(parameter_shapes(self.model)):
                yield name, contiguous(array, self.dtype)
                read(array.size * self.dtype.itemsize)

        return assemble(self.model, tensors(), dtype=self.dtype, shardings=shardings)


def open_component(source: Source, name: str, *, dtype: Any = None, depth: int | None = None) -> Unfilled:
    """A component, checked. Arguments and errors as for `load_component`."""
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
    return open_component(opened, name, dtype=dtype, depth=depth).fill(shardings=shardings)
