"""Reads and writes safetensors files tensor by tensor with plain file calls.

The `safetensors` package maps or holds the whole file, and a mapped file's pages count as resident memory. Here one
tensor at a time is in memory. The format: 8 bytes of header length (little endian), the header in JSON, the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import parse_object
from seg4diff_jax.convert.layout import contiguous, raw
from seg4diff_jax.convert.names import Shape
from seg4diff_jax.convert.sources.container import HEAD, NO_SAFETENSORS, container_of
from seg4diff_jax.convert.sources.quantised import INSTEAD
from seg4diff_jax.convert.sources.stored_tensor import is_addressable, read_bytes
from seg4diff_jax.quoting import quoted

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNREAD = {
    **dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2"), "weights of 4 or 6 bits (MXFP4, MXFP6, NVFP4)"),
    "F8_E4M3FNUZ": "8-bit floats of AMD's kind",
    "F8_E5M2FNUZ": "8-bit floats of AMD's kind",
    "C64": "complex numbers",
}
"""Dtypes of the format that are not read, and what they are."""
LARGEST_HEADER = 10_000_000
"""Most bytes of a header: thirty times what SD3.5-large with all text encoders needs, a tenth of the format's limit."""
LARGEST_RANK = 8


@dataclass(frozen=True)
class TensorInfo:
    """The place of one tensor: `offset` counts bytes from the start of `file`."""

    file: Path
    shape: Shape
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, *, once: bool = False) -> np.ndarray:
        """Returns the numbers, as `StoredTensor.read` does."""
        return read_bytes(self.file, self.offset, self.nbytes, once=once).view(self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns every tensor of a file, in the order of the data.

    Raises CheckpointError, which names the file, when the file is absent, truncated or of another format, or when its
    header does not describe its data.
    """
    return read_annotated(path)[0]


def read_annotated(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Returns every tensor of a file as `read_header` does, and the header's metadata."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            container = container_of(file.read(HEAD))
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if size >= 8 and length <= min(size - 8, LARGEST_HEADER) else None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: expected a file, found a directory") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if container in NO_SAFETENSORS:
        raise CheckpointError(f"{path}: {NO_SAFETENSORS[container]}")
    if text is None:
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file: its first 8 bytes announce a header of "
            f"{length} bytes, the file has {size} bytes in all (headers of at most {LARGEST_HEADER} are read)"
        )
    header = parse_object(text, f"{path}: corrupt header")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise CheckpointError(f"{path}: corrupt header: expected an object of strings as __metadata__")
    return _placed(path, size, 8 + len(text), header), metadata


def _placed(path: Path, size: int, begin: int, header: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Returns tensors with their place in a file of `size` bytes. They must fill its data, which begins at `begin`."""
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name, (shape, dtype, start, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        tensors[name] = info = TensorInfo(path, shape, dtype, begin + start)
        if start != end or stop - start != info.nbytes:
            raise CheckpointError(
                f"{path}: corrupt header: {name} ({dtype} {list(shape)}) should take {info.nbytes} bytes from "
                f"{end}, its data_offsets are [{start}, {stop}]"
            )
        end = stop
    if size != begin + end:
        state = "truncated" if size < begin + end else "too long"
        raise CheckpointError(
            f"{path}: {state}: its header describes {begin + end} bytes, the file has {size}; fetch it again"
        )
    return tensors


def _span(path: Path, name: str, entry: Any) -> tuple[Shape, np.dtype, int, int]:
    if isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and entry["dtype"] in UNREAD:
        raise CheckpointError(f"{path}: {name} is {entry['dtype']}: {UNREAD[entry['dtype']]} are not read; {INSTEAD}")
    try:
        dtype = DTYPES[entry["dtype"]]
        numbers = [*entry["shape"], *entry["data_offsets"]]
        start, stop = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: corrupt header: {name} needs a dtype of {', '.join(DTYPES)}, a shape and two data_offsets, "
            f"found {quoted(entry)}"
        ) from None
    if (
        not all(type(number) is int and number >= 0 for number in numbers)
        or len(entry["shape"]) > LARGEST_RANK
        or not is_addressable(tuple(entry["shape"]))
    ):
        raise CheckpointError(f"{path}: corrupt header: {name} has the shape or offsets {quoted(numbers)}")
    return tuple(entry["shape"]), dtype, start, stop


def read_tensor(info: TensorInfo) -> np.ndarray:
    """Returns one tensor's numbers. Raises CheckpointError when the file ends early."""
    return info.read()


def write_safetensors(
    path: Path, layout: Mapping[str, tuple[Shape, np.dtype]], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a file whose shapes are known before its numbers are.

    Args:
      layout: every tensor's shape and dtype, in the order of the data.
      tensors: the same names in the same order, with their numbers.

    Raises ValueError when the two disagree.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    names = iter(layout.items())
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors:
            expected = next(names, None)
            if expected != (name, (array.shape, array.dtype)):
                raise ValueError(f"expected {expected}, got {name} {array.shape} {array.dtype}")
            file.write(raw(contiguous(array)))
        if (left := next(names, None)) is not None:
            raise ValueError(f"{left[0]} was announced and not written")
        file.flush()
        os.fsync(file.fileno())
