"""Reads GGUF files. The header is read here, within bounds; the `gguf` package turns blocks into numbers.

The package's own reader maps the whole file and trusts what the file says about itself.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.names import Shape
from seg4diff_jax.convert.sources.stored_tensor import is_addressable, read_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
PLAIN: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
"""Types that are stored as plain numbers."""
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""Types that are stored as blocks of small integers with scales; they are read as float32."""
ALIGNMENT = 32
"""Alignment of tensors in bytes, unless the file says otherwise."""
LARGEST_COUNT = 1 << 16
"""Most tensors, and most keys of the metadata."""
LARGEST_ARRAY = 1 << 20
"""Most entries of an array in the metadata; vocabularies of tokens are such arrays."""
LARGEST_HEADER = 1 << 25
"""Most bytes before the first tensor."""
LONGEST_NAME = 1 << 16
LARGEST_RANK = 4
STRIP = 1 << 22
"""Numbers that are dequantised at a time."""

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
"""Types of metadata values that are no scalars."""


@dataclass(frozen=True)
class GGUFTensor:
    """The place and the type of one tensor: `type` is ggml's name, `offset` counts bytes from the start of `file`."""

    file: Path
    shape: Shape
    type: str
    offset: int

    @property
    def dtype(self) -> np.dtype:
        return PLAIN.get(self.type, np.dtype(np.float32))

    def read(self, *, once: bool = False) -> np.ndarray:
        """Returns the numbers, as `StoredTensor.read` does. Blocks are read and dequantised a few rows at a time."""
        if self.type in PLAIN:
            count = math.prod(self.shape) * self.dtype.itemsize
            return read_bytes(self.file, self.offset, count, once=once).view(self.dtype).reshape(self.shape)
        from gguf.quants import dequantize

        quantisation = _quantisations()[self.type]
        width = self.shape[-1]
        rows, stride = math.prod(self.shape[:-1]), width // quantisation.block * quantisation.size
        numbers = np.empty((rows, width), np.float32)
        step = max(1, STRIP // max(1, width))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            strip = read_bytes(self.file, self.offset + start * stride, (stop - start) * stride, once=once)
            numbers[start:stop] = dequantize(strip.reshape(stop - start, stride), quantisation.kind)
        return numbers.reshape(self.shape)


@dataclass(frozen=True)
class _Quantisation:
    """A type of the format: `block` numbers take `size` bytes; `kind` is the type in the `gguf` package."""

    kind: Any
    block: int
    size: int


@cache
def _quantisations() -> dict[str, _Quantisation]:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ModuleNotFoundError:
        raise CheckpointError("GGUF files need the package gguf: pip install gguf") from None
    return {kind.name: _Quantisation(kind, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}


@cache
def _type_names() -> dict[int, str]:
    return {quantisation.kind.value: name for name, quantisation in _quantisations().items()}


def read_gguf(path: Path) -> tuple[str | None, dict[str, GGUFTensor]]:
    """Returns the architecture that a file names (as in `sd3`), and every tensor in the order of the data.

    Shapes are PyTorch's: the format has them the other way round.

    Raises CheckpointError, which names the file, when the file is absent, truncated or damaged, or has a type that is
    not read.
    """
    try:
        with path.open("rb") as file:
            return _read(_Cursor(path, file, path.stat().st_size))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: expected a file, found a directory") from None


def _read(cursor: _Cursor) -> tuple[str | None, dict[str, GGUFTensor]]:
    path = cursor.path
    if (magic := cursor.take(4, "the file's mark")) != MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file: it begins with {magic!r}; expected {MAGIC!r}")
    version = cursor.number("I")
    if version not in VERSIONS:
        order = " (big-endian)" if version & 0xFFFF == 0 else ""
        raise CheckpointError(
            f"{path}: GGUF version {version}{order} is not read; expected {' or '.join(map(str, VERSIONS))} in "
            "little-endian order"
        )
    tensors, keys = cursor.count("tensors", "Q", LARGEST_COUNT), cursor.count("keys", "Q", LARGEST_COUNT)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.string(LONGEST_NAME)
        if key in metadata:
            raise CheckpointError(f"{path}: corrupt header: the key {key} occurs twice; fetch the file again")
        metadata[key] = cursor.value(cursor.number("I"))
    described = [_described(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: corrupt header: general.alignment is {alignment!r}; expected a power of two")
    architecture = metadata.get("general.architecture")
    return architecture if isinstance(architecture, str) else None, _placed(cursor, described, alignment)


@dataclass(frozen=True)
class _Described:
    """A tensor as the header describes it; `offset` counts bytes from the start of the data."""

    name: str
    shape: Shape
    type: int
    offset: int


def _described(cursor: _Cursor) -> _Described:
    name = cursor.string(LONGEST_NAME)
    rank = cursor.count(f"dimensions of {name}", "I", LARGEST_RANK)
    shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
    return _Described(name, shape, cursor.number("I"), cursor.number("Q"))


def _placed(cursor: _Cursor, described: list[_Described], alignment: int) -> dict[str, GGUFTensor]:
    """Returns tensors with their place in the file. The format asks that they lie aligned and without gaps."""
    path, last, end = cursor.path, 0, 0
    begin = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, number, offset in ((each.name, each.shape, each.type, each.offset) for each in described):
        if name in tensors:
            raise CheckpointError(f"{path}: corrupt header: {name} occurs twice; fetch the file again")
        kind = _type_names().get(number, f"type {number}")
        if kind not in PLAIN and kind not in BLOCKS:
            raise CheckpointError(
                f"{path}: {name} is {kind}, which is not read; fetch a file of {', '.join(BLOCKS)} or F16"
            )
        quantisation = _quantisations()[kind]
        count = math.prod(shape)
        if not is_addressable(shape) or (shape[-1] if shape else 1) % quantisation.block:
            raise CheckpointError(
                f"{path}: corrupt header: {name} has the shape {list(shape)}; rows of {kind} are whole blocks of "
                f"{quantisation.block} numbers"
            )
        size = count // quantisation.block * quantisation.size
        if offset != end:
            raise CheckpointError(f"{path}: corrupt header: {name} begins at {offset}; expected {end} of its data")
        if begin + offset + size > cursor.size:
            raise CheckpointError(
                f"{path}: truncated: {name} ({kind} {list(shape)}) ends at {begin + offset + size}, the file has "
                f"{cursor.size} bytes; fetch it again"
            )
        tensors[name] = GGUFTensor(path, shape, kind, begin + offset)
        last, end = offset + size, -(-(offset + size) // alignment) * alignment
    if cursor.size > begin + last and cursor.size != begin + end:
        raise CheckpointError(
            f"{path}: too long: its header describes {begin + last} bytes, or {begin + end} with the last tensor "
            f"filled up to {alignment}, the file has {cursor.size}; fetch it again"
        )
    return tensors


@dataclass
class _Cursor:
    """Reads a file in order, and never past its end."""

    path: Path
    file: BinaryIO
    size: int
    position: int = 0

    def take(self, count: int, what: str = "its header") -> bytes:
        if self.position + count > LARGEST_HEADER:
            raise CheckpointError(f"{self.path}: corrupt header: it is longer than {LARGEST_HEADER} bytes")
        found = self.file.read(count) if count <= self.size - self.position else b""
        if len(found) != count:
            raise CheckpointError(
                f"{self.path}: truncated or damaged: {what} needs {count} bytes from {self.position}, the file has "
                f"{self.size} in all; fetch it again"
            )
        self.position += count
        return found

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def count(self, what: str, form: str, most: int) -> int:
        number = self.number(form)
        if number > most:
            raise CheckpointError(f"{self.path}: corrupt header: {number} {what}; expected at most {most}")
        return number

    def string(self, longest: int) -> str:
        data = self.take(self.count("bytes in a string", "Q", longest))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: corrupt header: {data[:40]!r} is no text; fetch it again") from None

    def value(self, kind: int) -> Any:
        """Returns a value of the metadata; None for an array, which is skipped."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string(LARGEST_HEADER)
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: corrupt header: a value has the unknown type {kind}")
        entries, count = self.number("I"), self.count("entries in an array", "Q", LARGEST_ARRAY)
        if entries in SCALARS:
            self.take(count * struct.calcsize(f"<{SCALARS[entries]}"))
        elif entries == STRING:
            for _ in range(count):
                self.take(self.count("bytes in a string", "Q", LARGEST_HEADER))
        else:
            raise CheckpointError(f"{self.path}: corrupt header: an array of the unknown type {entries}")
        return None
