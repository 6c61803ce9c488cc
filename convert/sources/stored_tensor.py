"""A tensor of a file, described before its numbers are read. Every reader of weights returns such tensors."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.names import Shape

LARGEST_TENSOR = 1 << 62
"""Most numbers of a tensor, counted without zeros in its shape. Nothing can be computed with larger shapes."""


@runtime_checkable
class StoredTensor(Protocol):
    """One tensor of a file. `dtype` is the dtype that `read` returns; the file may hold the numbers in another form."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, *, once: bool = False) -> np.ndarray:
        """Returns the numbers. Raises CheckpointError when the file ends early.

        `once` says that the numbers will not be read again soon.
        """
        ...


def is_addressable(shape: Shape) -> bool:
    return math.prod(size or 1 for size in shape) <= LARGEST_TENSOR


def read_bytes(file: Path, offset: int, count: int, *, once: bool = False) -> np.ndarray:
    """Returns `count` bytes of a file, from `offset`, as uint8 [count]. Raises CheckpointError if the file ends early.

    With `once` the pages of these bytes leave the system's cache. A conversion reads and writes more than the memory of
    most machines. For the kernel it is several times cheaper to reuse pages that were just freed than to find new ones.
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
