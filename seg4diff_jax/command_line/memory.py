"""What a command says when a device's memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jax.errors import JaxRuntimeError

TO_LOAD = "give --dtype bfloat16, or use a device with more memory"
"""The remedy when the weights themselves do not fit."""


@contextmanager
def explaining_full_memory(remedy: str) -> Iterator[None]:
    """Raise MemoryError, with what to do, where JAX says that the device's memory is full."""
    try:
        yield
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(f"the device's memory is full: {remedy}") from None
