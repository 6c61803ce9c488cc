"""The training state, as flat dictionaries from names to arrays, and the split of a model into such dictionaries.

A model's parameters are split into trained and frozen ones. Only trained parameters get gradients and optimizer state
and are stored in checkpoints. Names are dotted nnx paths, so that one table (`seg4diff_jax.parallel`) says how a
parameter, its moments and its average are sharded over the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey
from jaxtyping import Array, UInt32

from seg4diff_jax.parallel import parameter_shardings

Parameters = dict[str, Any]
"""Arrays by dotted name."""


class TrainState(NamedTuple):
    """The state that each step updates and that checkpoints store.

    Attributes:
      batches: number of batches seen, int32.
      trainable: trained parameters, fp32.
      optimizer: optax's state.
      average: moving average of the parameters, or None.
      key: data of the run's random key; every batch folds its number into it.
    """

    batches: Any
    trainable: Parameters
    optimizer: Any
    average: Parameters | None
    key: Any


@dataclass(frozen=True)
class Structure:
    """A model's structure without its parameters."""

    graph: Any
    variables: dict[str, tuple[tuple, Any]]

    def model(self, *parts: Parameters) -> Any:
        """Returns the model with these parameters. Each parameter is in exactly one of the parts."""
        parameters = {name: array for part in parts for name, array in part.items()}
        flat = [(path, variable.replace(parameters[name])) for name, (path, variable) in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


def take_apart(model: nnx.Module, trained: Any) -> tuple[Structure, Parameters, Parameters]:
    """Returns a model's structure, the parameters that the nnx filter `trained` picks, and all other parameters."""
    graph, chosen, others = nnx.split(model, trained, ...)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (chosen, others))
    variables = {name(path): (path, variable) for part in abstract for path, variable in nnx.to_flat_state(part)}
    return Structure(graph, variables), _arrays(chosen), _arrays(others)


def _arrays(state: Any) -> Parameters:
    return {name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def name(path: tuple) -> str:
    return ".".join(map(str, path))


def fresh(make: Callable[[nnx.Rngs], Any]) -> Callable[[int, Mesh], Any]:
    """Returns an initialiser that makes a model with its parameters sharded over the mesh.

    The parameters depend on the seed alone, not on the mesh.
    """

    def init(seed: int, mesh: Mesh) -> Any:
        build = lambda: nnx.split(make(nnx.Rngs(seed)))
        graph, shapes = nnx.eval_shape(build)
        rule = parameter_shardings(mesh)
        flat = nnx.to_flat_state(shapes)
        places = {name(path): rule(name(path), variable.get_value().shape) for path, variable in flat}
        arrays = jax.jit(lambda: _arrays(build()[1]), out_shardings=places)()
        return nnx.merge(
            graph, nnx.from_flat_state([(path, variable.replace(arrays[name(path)])) for path, variable in flat])
        )

    return init


def initial_state(
    trainable: Parameters, optimizer: optax.GradientTransformation, *, average: bool, key: UInt32[Array, " words"]
) -> TrainState:
    # A weakly typed parameter is strongly typed after the first step, so the step would be compiled twice.
    trainable = {name: array.astype(array.dtype) for name, array in trainable.items()}
    # The average is a copy: the step donates its input, and no array can be donated twice.
    copy = jax.tree.map(jnp.copy, trainable) if average else None
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), copy, key)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the sharding of each array of the state. A parameter's moments and average are sharded like it."""
    rule = parameter_shardings(mesh)

    def place(path: tuple, leaf: Any) -> NamedSharding:
        last = path[-1]
        if isinstance(last, DictKey) and last.key in state.trainable:
            return rule(last.key, leaf.shape)
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, state)
