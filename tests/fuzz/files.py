"""Damage to any file: what disks, networks and unlucky commands do to bytes, names and links."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.fuzz.reader import Damage, Inapplicable

Span = Callable[[bytes], range]
"""Which bytes of a file are damaged."""


def everywhere(contents: bytes) -> range:
    return range(len(contents))


def rewrite(file: Path, contents: bytes) -> None:
    """Write in place of what is there, be it a link."""
    file.unlink()
    file.write_bytes(contents)


def _place(random: np.random.Generator, span: range) -> int:
    if not span:
        raise Inapplicable
    return int(random.integers(span.start, span.stop))


def _stretch(random: np.random.Generator, span: range) -> slice:
    start = _place(random, span)
    return slice(start, min(span.stop, start + int(2 ** random.uniform(0, 9))))


def _truncate(random: np.random.Generator, file: Path) -> str:
    contents = file.read_bytes()
    place = _place(random, range(len(contents)))
    rewrite(file, contents[:place])
    return f"cut after {place} of {len(contents)} bytes"


def _append(random: np.random.Generator, file: Path) -> str:
    more = random.bytes(int(random.integers(1, 200)))
    rewrite(file, file.read_bytes() + more)
    return f"{len(more)} bytes more at the end"


def _duplicate(random: np.random.Generator, file: Path) -> str:
    contents = file.read_bytes()
    stretch = _stretch(random, everywhere(contents))
    rewrite(file, contents[: stretch.stop] + contents[stretch] + contents[stretch.stop :])
    return f"bytes {stretch.start} to {stretch.stop} twice"


def _empty(_: np.random.Generator, file: Path) -> str:
    rewrite(file, b"")
    return "empty"


def _remove(_: np.random.Generator, file: Path) -> str:
    file.unlink()
    return "absent"


def _directory(_: np.random.Generator, file: Path) -> str:
    file.unlink()
    file.mkdir()
    return "a directory in its place"


def _dangle(_: np.random.Generator, file: Path) -> str:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))
    return "a link to nothing"


def _swap(random: np.random.Generator, file: Path) -> str:
    others = [path for path in sorted(file.parent.glob(f"*{file.suffix}")) if path.is_file() and path != file]
    different = [path for path in others if path.read_bytes() != file.read_bytes()]
    if not different:
        raise Inapplicable
    other = different[random.integers(len(different))]
    between = file.with_name("between")
    shutil.move(file, between)
    shutil.move(other, file)
    shutil.move(between, other)
    return f"exchanged with {other.name}"


def flips(span: Span) -> Callable[[np.random.Generator, Path], str]:
    def flip(random: np.random.Generator, file: Path) -> str:
        contents = bytearray(file.read_bytes())
        place, bit = _place(random, span(bytes(contents))), int(random.integers(8))
        contents[place] ^= 1 << bit
        rewrite(file, bytes(contents))
        return f"bit {bit} of byte {place} of {len(contents)}"

    return flip


def overwrites(span: Span, *, zeros: bool) -> Callable[[np.random.Generator, Path], str]:
    def overwrite(random: np.random.Generator, file: Path) -> str:
        contents = bytearray(file.read_bytes())
        stretch = _stretch(random, span(bytes(contents)))
        length = stretch.stop - stretch.start
        contents[stretch] = bytes(length) if zeros else random.bytes(length)
        rewrite(file, bytes(contents))
        return f"{'zeros' if zeros else 'noise'} in bytes {stretch.start} to {stretch.stop} of {len(contents)}"

    return overwrite


def of_length(*, noticed: bool) -> tuple[Damage, ...]:
    """What changes a file's length."""
    return (
        Damage("truncate", _truncate, noticed),
        Damage("append", _append, noticed),
        Damage("duplicate", _duplicate, noticed),
    )


def of_values(span: Span = everywhere, *, noticed: bool) -> tuple[Damage, ...]:
    """What changes bytes where they are."""
    return (
        Damage("flip", flips(span), noticed),
        Damage("zeros", overwrites(span, zeros=True), noticed),
        Damage("noise", overwrites(span, zeros=False), noticed),
    )


def of_places(*, noticed: bool = True, swapped: bool = True) -> tuple[Damage, ...]:
    """What befalls a whole file. `swapped`: whether it shows that two of them have changed names."""
    return (
        Damage("empty", _empty, noticed),
        Damage("absent", _remove, noticed),
        Damage("directory", _directory, noticed),
        Damage("dangling", _dangle, noticed),
        Damage("swap", _swap, swapped),
    )
