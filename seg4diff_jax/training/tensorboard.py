"""TensorBoard event files, written directly: numbers and pictures need a dozen bytes of format and no library.

A file is a row of records: length (8 bytes), its checksum, data, its checksum; the checksums are CRC-32C, rotated and
shifted by a constant. The data is an `Event` message of protocol buffers (tensorflow/core/util/event.proto).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

CASTAGNOLI = 0x82F63B78
SESSION_START = 1


@cache
def _crc_table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = (value >> 1) ^ (CASTAGNOLI if value & 1 else 0)
        return value

    return tuple(map(entry, range(256)))


def masked_crc32c(data: bytes) -> int:
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _scalar(tag: str, value: float) -> bytes:
    return _bytes(1, _bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", value))


class EventFile:
    """One event file; each call writes through to the disk."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**6}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / name).open("ab")
        self._record(_bytes(3, b"brain.Event:2"))

    def restarted(self, step: int) -> None:
        """What other files of the directory have of this step and later ones is void."""
        self._record(_number(2, step) + _bytes(7, _number(1, SESSION_START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = b"".join(_scalar(tag, value) for tag, value in values.items())
        self._record(_number(2, step) + _bytes(5, summary))

    def image(self, step: int, tag: str, png: bytes, height: int, width: int) -> None:
        picture = _number(1, height) + _number(2, width) + _number(3, 3) + _bytes(4, png)
        self._record(_number(2, step) + _bytes(5, _bytes(1, _bytes(1, tag.encode()) + _bytes(4, picture))))

    def _record(self, event: bytes) -> None:
        data = b"\x09" + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(data))
        checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self._file.write(length + next(checksums) + data + next(checksums))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
