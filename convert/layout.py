"""Moves large arrays at the speed of memory: contiguous copies, transposes, casts and checksums."""

from __future__ import annotations

import zlib

import ml_dtypes
import numpy as np

WEIGHTS = tuple(
    np.dtype(kind)
    for kind in (
        np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
    )
)  # fmt: skip
"""Dtypes that weights may have. Integers are quantised weights, which mean nothing without their scales."""
ROWS = 16
"""Rows of a matrix that are transposed at a time: few enough that the cache lines being written stay in the cache."""


def contiguous(array: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """Returns `array` in C order and in `dtype` (default: its own); returns `array` itself if it is so already.

    NumPy's own copy of a transposed matrix is ten times slower than memory. This function copies strips of rows.
    """
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    if array.ndim != 2 or not array.T.flags.c_contiguous or array.flags.c_contiguous:
        return np.ascontiguousarray(array.astype(dtype, copy=False)).reshape(array.shape)
    rows = array.T.astype(dtype, copy=False)
    result = np.empty(array.shape, dtype)
    for start in range(0, len(rows), ROWS):
        result[:, start : start + ROWS] = rows[start : start + ROWS].T
    return result


def is_weight(dtype: np.dtype) -> bool:
    """Whether a network's parameters may have this dtype."""
    return dtype in WEIGHTS


def raw(array: np.ndarray) -> memoryview:
    """Returns the bytes of a C-ordered array of any dtype, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def checksum(array: np.ndarray) -> str:
    """Returns the CRC-32 of a C-ordered array's bytes, in hexadecimal."""
    return f"{zlib.crc32(raw(array)):08x}"


def dtype_named(name: str) -> np.dtype:
    """Returns the dtype that `str(dtype)` prints as `name`, such as bfloat16. Raises TypeError for other names."""
    return np.dtype(getattr(ml_dtypes, name, name))


def is_dtype(name: str) -> bool:
    """Whether `name` is what `str(dtype)` prints for a dtype of numbers."""
    try:
        return str(dtype_named(name)) == name and not dtype_named(name).hasobject
    except (TypeError, ValueError, SyntaxError):
        return False
