"""Operations of a traced step: two for each multiply-add of its matrix products and convolutions, loops multiplied out.

A compiled program's own cost analysis counts the body of a loop once, and a kernel not at all. Here the program is read
as JAX traced it: what is computed again in the backward pass is in it, and so are tiles that kernels fill with padding.
Everything else (norms, activations, softmax) is a small part of a percent of the operations and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def operations(jaxpr: Any, chips: int = 1, shares: int = 1) -> float:
    """Of one chip.

    What the compiler divides is taken to be divided evenly: products over all chips, convolutions over those that have
    pictures of their own, for their kernels are not split over `tensor`. What is written for each chip (`shard_map`)
    counts as written. Of a condition's branches the longest counts.

    Args:
      jaxpr: of a function of the whole mesh's arrays.
      chips: of the mesh.
      shares: into which a batch is divided.

    Raises:
      ValueError: a loop of unknown length holds products.
    """
    return sum((_of_equation(equation, chips, shares) for equation in _plain(jaxpr).eqns), 0.0)


def _of_equation(equation: Any, chips: int, shares: int) -> float:
    kind, params = equation.primitive.name, equation.params
    if kind == "dot_general":
        return _product(equation) / chips
    if kind == "conv_general_dilated":
        return _convolution(equation) / shares
    if kind == "cond":
        return max(operations(branch, chips, shares) for branch in params["branches"])
    if kind == "shard_map":
        return operations(params["jaxpr"])
    inside = sum((operations(inner, chips, shares) for inner in _inner(params)), 0.0)
    if kind == "scan":
        return params["length"] * inside
    if kind == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * inside
    if kind == "while" and inside:
        raise ValueError("a loop of unknown length holds matrix products: their number is unknown")
    return inside


def _product(equation: Any) -> float:
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    kernel, params = equation.invars[1].aval.shape, equation.params
    out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
    taps = math.prod(kernel) / out_features / math.prod(params["lhs_dilation"])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Programs among an equation's parameters."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_plain(each), "eqns"):
                yield each


def _plain(jaxpr: Any) -> Any:
    """Without its constants, if it is closed."""
    return getattr(jaxpr, "jaxpr", jaxpr)
