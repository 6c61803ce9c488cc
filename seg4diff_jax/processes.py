"""Several processes, each on devices of its own: what they tell one another, and what each of them does."""

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
"""What is wrong with the input; anything else ends a process, and JAX then ends the others."""


def local_mesh() -> Mesh | None:
    """The devices of this process, over which batches are split; None for one device."""
    devices = jax.local_devices()
    return make_mesh(among=devices) if len(devices) > 1 else None


def gathered(message: bytes) -> list[bytes]:
    """What each process says, in the order of processes. All must take part; at most 2 GiB each."""
    if jax.process_count() == 1:
        return [message]
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(message)))).reshape(-1)
    padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)  # few lengths: few programs
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths.tolist(), strict=True)]


def in_step(work: Callable[[], Result]) -> Result:
    """Do something in every process. Where it fails in one it fails in all: none waits for what will not come.

    Raises what `work` raises, or ValueError with the message of another process.
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
    """As `in_step`, the first process before the others: what it writes, they find."""
    first = jax.process_index() == 0
    early = in_step(lambda: work() if first else None)
    late = in_step(lambda: None if first else work())
    return early if first else late  # pyright: ignore[reportReturnType]


def join_processes() -> None:
    """Find the other processes: through the cluster, or through JAX_COORDINATOR_ADDRESS and its like."""
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))
