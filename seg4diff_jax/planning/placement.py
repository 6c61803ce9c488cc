"""Abstract arrays on a mesh: shapes, dtypes and places of what a run would hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from seg4diff_jax.parallel import parameter_shardings
from seg4diff_jax.training.state import name as dotted


def placed(model: Any, mesh: Mesh) -> Any:
    """Returns an abstract model whose parameters have the places that the mesh's rules give them."""
    graph, state = nnx.split(model)
    rule = parameter_shardings(mesh)
    found = []
    for path, variable in nnx.to_flat_state(state):
        leaf = variable.get_value()
        place = rule(dotted(path), leaf.shape)
        found.append((path, variable.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place))))
    return nnx.merge(graph, nnx.from_flat_state(found))


def on_one_chip(tree: Any) -> float:
    """Returns the bytes that one chip holds of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def read_on_one_chip(jaxpr: Any, arguments: Sequence[Any]) -> list[float]:
    """Returns for each argument of a traced function the bytes that one chip holds of the arrays that it reads.

    The compiler drops the others, such as the parameters of a decoder in a function that only encodes.
    """
    program = jaxpr.jaxpr
    read = {id(name) for equation in program.eqns for name in equation.invars} | set(map(id, program.outvars))
    names, found = iter(program.invars), []
    for argument in arguments:
        leaves = [leaf for leaf in jax.tree.leaves(argument) if id(next(names)) in read]
        found.append(on_one_chip([leaf for leaf in leaves if hasattr(leaf, "sharding")]))
    return found
