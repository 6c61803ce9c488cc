"""The fraction of peak that a run logs: the operations of a step, relative to what the devices can compute."""

from __future__ import annotations

import time
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIDE = {"cpu": 1024}
LARGE, PRODUCTS, SECONDS = 8192, 4, 0.5
"""Side of the matrices for backends that `SIDE` does not list; products per program; seconds for which it is timed."""


class Work(NamedTuple):
    """The work of a step for one item of a batch.

    Attributes:
      flops: operations that are needed, two for each multiply-add; recomputation by gradient checkpointing is left out.
      dtype: dtype of the products.
    """

    flops: float
    dtype: str


@cache
def measured_peak(dtype: str) -> float:
    """Measures operations per second of all devices of all processes, in products of large square matrices.

    Takes about a second. The devices of this process are timed at the same time. So simulated devices, which share the
    cores of one machine, are not counted as if each had all cores.
    """
    devices = jax.local_devices()
    side = SIDE.get(jax.default_backend(), LARGE)
    matrices = [jax.device_put(jnp.full((side, side), 1 / side, dtype), device) for device in devices]
    run = lambda: jax.block_until_ready([_products(matrix) for matrix in matrices])
    run()  # the first run compiles
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 * PRODUCTS * len(devices) * jax.process_count() / min(seconds)


@jax.jit
def _products(matrix: Float[Array, "side side"]) -> Float[Array, "side side"]:
    return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: matrix @ x, matrix)
