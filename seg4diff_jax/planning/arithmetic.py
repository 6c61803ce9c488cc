"""Counts the operations of a traced step: two per multiply-add of its matrix products and convolutions.

The cost analysis of a compiled program counts the body of a loop once, and kernels not at all. So this module reads the
program as JAX traced it, and counts a loop's body as often as it runs. Recomputation in the backward pass is counted,
and so is the padding in kernels' tiles. All else (norms, activations, softmax) is far below one percent of the
operations and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.lax import Precision

FP32_PASSES = 6
"""Products of bf16 parts by which TPUs make one product of fp32 at the highest precision (XLA's `bf16_6x`)."""


def operations(jaxpr: Any, chips: int = 1, shares: int = 1, *, passes: int = 1) -> float:
    """Returns the operations of one chip.

    The compiler is assumed to divide work evenly: products over all chips, convolutions over the shares of a batch,
    since their kernels are not split over `tensor`. Programs written for each chip (`shard_map`) count as written. Of
    the branches of a condition, the one with the most operations counts.

    Args:
      jaxpr: the traced function, of arrays over the whole mesh.
      chips: number of chips of the mesh.
      shares: number of shares into which a batch is divided.
      passes: how often an operation of fp32 at the highest precision counts: `FP32_PASSES` in bf16 operations of a TPU.

    Raises:
      ValueError: a loop of unknown length holds products.
    """
    return sum((_of_equation(equation, chips, shares, passes) for equation in _plain(jaxpr).eqns), 0.0)


def _of_equation(equation: Any, chips: int, shares: int, passes: int) -> float:
    kind, params = equation.primitive.name, equation.params
    if kind == "dot_general":
        return _product(equation) * _weight(equation, passes) / chips
    if kind == "conv_general_dilated":
        return _convolution(equation) * _weight(equation, passes) / shares
    if kind == "cond":
        return max(operations(branch, chips, shares, passes=passes) for branch in params["branches"])
    if kind == "shard_map":
        return operations(params["jaxpr"], passes=passes)
    inside = sum((operations(inner, chips, shares, passes=passes) for inner in _inner(params)), 0.0)
    if kind == "scan":
        return params["length"] * inside
    if kind == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * inside
    if kind == "while" and inside:
        raise ValueError("a loop of unknown length holds matrix products: their number is unknown")
    return inside


def _weight(equation: Any, passes: int) -> int:
    precision, operand = equation.params["precision"], equation.invars[0].aval
    highest = Precision.HIGHEST in (precision if isinstance(precision, tuple) else (precision,))
    return passes if highest and operand.dtype == jnp.float32 else 1


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
    """Yields the programs among an equation's parameters."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_plain(each), "eqns"):
                yield each


def _plain(jaxpr: Any) -> Any:
    """Returns a program without its constants, if it is a closed one."""
    return getattr(jaxpr, "jaxpr", jaxpr)
