"""A tensor of a file, described before it is read: what every reader of weights gives and every component takes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.names import Shape

LARGEST_TENSOR = 1 << 62
"""Numbers, those of an empty tensor counted without its zeros: shapes of more cannot be computed with."""


@runtime_checkable
class StoredTensor(Protocol):
    """One tensor of a file. `dtype` is what `read` gives; what lies in the file may be packed otherwise."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, *, once: bool = False) -> np.ndarray:
        """The numbers. `once`: they will not be read again soon. Raises CheckpointError when the file ends early."""
        ...


def is_addressable(shape: Shape) -> bool:
    return math.prod(size or 1 for size in shape) <= LARGEST_TENSOR


def read_bytes(file: Path, offset: int, count: int, *, once: bool = False) -> np.ndarray:
    """`count` bytes of a file from `offset` on, as uint8 [count]. Raises CheckpointError when the file ends early.

    With `once` their pages leave the system's cache. A conversion reads and writes more than most memories hold; taking
    pages that were just freed is several times cheaper for the kernel than taking ever new ones.
    """
    buffer = np.empty(count, np.uint8)
    view, filled = buffer.data, 0
    with file.open("rb", buffering=0) as opened:
        opened.seek(offset)
        while filled < count:
            found = opened.readinto(view[filled:])
            if not found:
                raise CheckpointError(f"{file}: truncated: expected {count} bytes from {offset}, found {filled}")
            filled += found
        if once and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), offset, count, os.POSIX_FADV_DONTNEED)
    return buffer
