"""Multiply-adds of a traced program, read from its operations: products and convolutions; loops count as they run."""

from __future__ import annotations

import math
from typing import Any

import jax


def traced_flops(function: Any, *args: Any) -> int:
    """Of one call, two for each multiply-add."""
    return count(jax.make_jaxpr(function)(*args).jaxpr)


def count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, out = equation.primitive.name, equation.outvars[0].aval
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(out.shape) * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            total += 2 * math.prod(out.shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        assert name not in ("while", "cond"), f"{name}: how often it runs is not known"
        times = equation.params["length"] if name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += times * count(inner)
    return total
