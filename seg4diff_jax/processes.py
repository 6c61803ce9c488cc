"""Runs work in several processes, each with its own devices, and exchanges messages between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from seg4diff_jax.parallel import make_mesh

Result = TypeVar("Result")
FAULTS = (ValueError, OSError, MemoryError, FloatingPointError)
"""Exceptions that all processes report together. Any other exception ends its process, and JAX then ends the others."""


def local_mesh() -> Mesh | None:
    """Makes a mesh of this process's devices, over which batches are split. None: there is only one device."""
    devices = jax.local_devices()
    return make_mesh(among=devices) if len(devices) > 1 else None


def gathered(message: bytes) -> list[bytes]:
    """Returns the messages of all processes, in their order. All must make this call; a message has at most 2 GiB."""
    if jax.process_count() == 1:
        return [message]
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(message)))).reshape(-1)
    padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)  # few lengths, so that few programs are compiled
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths.tolist(), strict=True)]


def in_step(work: Callable[[], Result]) -> Result:
    """Runs `work` in every process. If it fails in one, the call fails in all, so that no process waits forever.

    Raises what `work` raises here, or else ValueError with the message of another process.
    """
    if jax.process_count() == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except FAULTS as error:
        failure = error
    messages = gathered(b"" if failure is None else f"{failure}".encode() or b"it ran out of memory")
    if failure is not None:
        raise failure
    for number, message in enumerate(messages):
        if message:
            raise ValueError(f"process {number} of {len(messages)}: {message.decode()}")
    return result  # pyright: ignore[reportReturnType]


def in_turn(work: Callable[[], Result]) -> Result:
    """Does as `in_step`, but runs the first process before the others, so that they find what it writes."""
    first = jax.process_index() == 0
    early = in_step(lambda: work() if first else None)
    late = in_step(lambda: None if first else work())
    return early if first else late  # pyright: ignore[reportReturnType]


def join_processes() -> None:
    """Connects to the other processes.

    JAX finds them through the cluster, or through JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))
