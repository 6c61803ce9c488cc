"""The message of a command when the memory of a device is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jax.errors import JaxRuntimeError

TO_LOAD = "give --dtype bfloat16, or use a device with more memory"
"""What to do when the weights alone do not fit."""


@contextmanager
def explaining_full_memory(remedy: str) -> Iterator[None]:
    """Raises MemoryError, with what to do, when JAX reports that the device's memory is full."""
    try:
        yield
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(f"the device's memory is full: {remedy}") from None
