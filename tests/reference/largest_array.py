"""How large an array a function would make, found without running it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def largest_array(function: Callable[..., Any], *args: Any) -> int:
    """Elements of the largest array in `function`'s jaxpr: arguments, results and everything in between.

    Loops, branches, checkpoints and nested jits are entered, so that what a loop holds at a time counts, and not what
    it adds up to. `args` may be abstract (`jax.eval_shape`, `jax.ShapeDtypeStruct`). Fusion can only make fewer arrays.
    """
    return max(math.prod(shape) for shape in _shapes(jax.make_jaxpr(function)(*args)))


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    yield from (variable.aval.shape for variable in jaxpr.invars + jaxpr.constvars)
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _shapes(inner)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "jaxpr") or hasattr(value, "eqns")
