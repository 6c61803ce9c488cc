"""How much a step computes, beside what the devices can: the fraction of peak that a run logs."""

from __future__ import annotations

import time
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIDE = {"cpu": 1024}
LARGE, PRODUCTS, SECONDS = 8192, 4, 0.5
"""Side of the matrices where the table has none, how often they are multiplied in one program, and for how long it is
timed."""


class Work(NamedTuple):
    """What one item of a batch takes of a step.

    Attributes:
      flops: operations that are needed, two for each multiply-add; what is computed again to save memory is no part.
      dtype: of the products.
    """

    flops: float
    dtype: str


@cache
def measured_peak(dtype: str) -> float:
    """Operations per second of all devices of all processes, in products of large square matrices.

    Takes about a second. This process's devices work at the same time, so that those which share a machine's
    cores, as simulated ones do, are not counted as if each had them to itself.
    """
    devices = jax.local_devices()
    side = SIDE.get(jax.default_backend(), LARGE)
    matrices = [jax.device_put(jnp.full((side, side), 1 / side, dtype), device) for device in devices]
    run = lambda: jax.block_until_ready([_products(matrix) for matrix in matrices])
    run()  # compiles
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 * PRODUCTS * len(devices) * jax.process_count() / min(seconds)


@jax.jit
def _products(matrix: Float[Array, "side side"]) -> Float[Array, "side side"]:
    return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: matrix @ x, matrix)
