"""Builds a model from a stream of named tensors. Each tensor goes to its place in a stack of layers as it arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from seg4diff_jax.convert.errors import listed
from seg4diff_jax.convert.names import Assignment, NameTableError, Rule, assign, parameter_shapes
from seg4diff_jax.models.stacked_layers import Layered, layer_parameters

Model = TypeVar("Model", bound=Layered)


def abstract(make: Callable[[nnx.Rngs], Model]) -> Model:
    """Returns an abstract model: its parameters have shapes and dtypes, and no values."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def translated(
    assignments: Iterable[Assignment], read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads each source tensor once and yields (our name, our array) for each parameter that the tensor fills."""
    for assignment in assignments:
        yield from zip(assignment.targets, assignment.transform.to_jax(read(assignment.source)), strict=True)


def assemble(
    model: Model,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: DTypeLike | None = None,
    shardings: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> Model:
    """Fills an abstract model from (per-layer name, array) pairs, each parameter exactly once.

    Args:
      model: an abstract model, as `abstract` returns it; it is not changed.
      tensors: pairs under our per-layer names, in any order.
      dtype: dtype of the parameters; default: each tensor's own.
      shardings: returns a parameter's sharding from its path and stacked shape; default: the default device.

    Raises:
      NameTableError: a name is unknown or repeated, or a parameter is left unfilled.
    """
    graph, state = nnx.split(model)
    flat = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    waiting = layer_parameters(model)
    buffers: dict[str, np.ndarray] = {}
    for name, array in tensors:
        if name not in waiting:
            raise NameTableError(f"{name} is filled twice or is not a parameter of the model")
        path, row = waiting.pop(name)
        if path not in buffers:
            buffers[path] = np.empty(flat[path].get_value().shape, dtype or array.dtype)
        buffers[path][... if row is None else row] = array
    if waiting:
        raise NameTableError("missing parameters:\n  " + "\n  ".join(listed(list(waiting))))
    for path, variable in flat.items():
        buffer = buffers.pop(path)
        # Not `jnp.asarray`, which compiles a program for each shape.
        variable.set_value(jax.device_put(buffer, shardings(path, buffer.shape) if shardings else None))
    return nnx.merge(graph, state)


def from_state_dict(
    model: Model, rules: Iterable[Rule], tensors: Mapping[str, np.ndarray], *, dtype: DTypeLike | None = None
) -> Model:
    """Fills an abstract model from a PyTorch state dict whose values are numpy arrays."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assignments = assign(rules, shapes, parameter_shapes(model), what="state dict")
    return assemble(model, translated(assignments, tensors.__getitem__), dtype=dtype)
