"""One damaged input, read within bounds of time and memory, and what is to be said of that."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.fuzz import payload
from tests.fuzz.contents import CONTENTS
from tests.fuzz.reader import Damage, Inapplicable, Reader

Verdict = Literal[
    "refused", "equal", "undetectable", "silent", "traceback", "unnamed", "long", "endless", "memory", "leftover", "ran"
]
GOOD: tuple[Verdict, ...] = ("refused", "equal", "undetectable")
"""Refused in one of our errors that names the file, read as the undamaged one, or sound and another."""
SECONDS = 10
"""Most that a case may take; nearly all take less than a tenth of one."""
MEMORY = 1 << 30
"""Bytes of addresses that a case may take beyond what the process has: files are smaller by far."""
LONGEST_LINE, LONGEST_MESSAGE = 1000, 20_000
"""Characters of a refusal. Lists of tensors have a line for each."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Trial:
    """A case and what came of it. `line` names it and says how the input was damaged; `said`: the error's message."""

    line: str
    verdict: Verdict
    said: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.line}\n    {self.said[:600]}"


class Expired(BaseException):
    """A case takes too long. No `except Exception` of a reader's takes it for a fault of its input."""


def fingerprint(value: Any) -> str:
    """Equal for equal readings: of arrays dtype, shape and bytes count."""
    return hashlib.sha256("".join(_told(value)).encode()).hexdigest()


def _told(value: Any) -> Iterator[str]:
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}{hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield f"{key!r}:"
            yield from _told(value[key])
    elif isinstance(value, list | tuple):
        yield f"{len(value)}["
        for each in value:
            yield from _told(each)
    elif is_dataclass(value):
        yield from _told({one.name: getattr(value, one.name) for one in fields(value)})
    else:
        yield f"{type(value).__name__} {value!r};"


@contextlib.contextmanager
def bounds() -> Iterator[None]:
    """Raises Expired after `SECONDS`, and again each second for what goes on; allocations past `MEMORY` fail."""

    def expire(*_: object) -> None:
        raise Expired

    former = signal.signal(signal.SIGALRM, expire)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, former)


def draw(name: str, reader: Reader, case: int) -> tuple[str, Damage, np.random.Generator]:
    """A case's pattern of files and damage, and the generator that draws the rest.

    Cases go through all damages of all patterns, in an order of the reader's own, before they repeat one.
    """
    key = zlib.crc32(name.encode())
    every = [(pattern, damage) for pattern, holds in reader.files.items() for damage in CONTENTS[holds]]
    order = np.random.default_rng(np.random.SeedSequence([key])).permutation(len(every))
    pattern, damage = every[order[case % len(every)]]
    return pattern, damage, np.random.default_rng(np.random.SeedSequence([key, case]))


def steady(path: Path) -> tuple[str, int]:
    """What to sort files by, some of whose names are random."""
    return re.sub(r"[0-9a-f]{16,}", "*", str(path)), path.stat().st_size


def try_case(name: str, reader: Reader, case: int, sound: Path, expected: str, work: Path) -> Trial | None:
    """Damage a copy of a sound input and read it.

    Args:
      sound: the input; its name and what lies beside it stay as they are.
      expected: fingerprint of its reading.
      work: an empty directory.

    Returns None where the input has nothing that could be damaged in the case's way.
    """
    pattern, damage, random = draw(name, reader, case)
    root = Path(shutil.copytree(sound, work / sound.name, symlinks=True))
    files = sorted((path for path in root.glob(pattern) if path.is_file()), key=steady)
    file = files[random.integers(len(files))]
    try:
        said = damage.apply(random, file)
    except Inapplicable:
        return None
    inside = file.relative_to(root)
    line = f"{name}-{case}: {inside}: {damage.name}: {said}"
    free = not damage.noticed or any(
        re.search(one, f"{inside}: {damage.name}: {said}") for one in reader.free
    )
    payload.traces.clear()
    verdict, message = _read(reader, root, file, expected, free)
    if payload.traces:
        verdict = "ran"
    elif verdict == "refused" and (left := [path.name for path in work.iterdir() if path != root]):
        verdict, message = "leftover", f"{', '.join(left)}; {message}"
    return Trial(line, verdict, message)


def _read(reader: Reader, root: Path, file: Path, expected: str, free: bool) -> tuple[Verdict, str]:
    errors = io.StringIO()
    began = time.perf_counter()
    try:
        with bounds(), contextlib.redirect_stderr(errors):
            found = fingerprint(reader.read(root))
    except Expired:
        return "endless", f"more than {SECONDS} s"
    except MemoryError:
        return "memory", f"more than {MEMORY >> 20} MiB"
    except (Exception, SystemExit) as error:
        if time.perf_counter() - began > SECONDS:
            return "endless", repr(error)[:600]
        return _refusal(reader, root, file, error, errors.getvalue())
    if found == expected:
        return "equal", ""
    return "undetectable" if free else "silent", ""


def _refusal(reader: Reader, root: Path, file: Path, error: BaseException, printed: str) -> tuple[Verdict, str]:
    message = printed if isinstance(error, SystemExit) else str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, SystemExit):
        ours = Path(where.filename).is_relative_to(ROOT)
        if type(error) not in reader.errors or not ours:
            place = f"{Path(where.filename).name}:{where.lineno}"
            return "traceback", f"{type(error).__name__} at {place}: {message}"
    if len(message) > LONGEST_MESSAGE or any(len(line) > LONGEST_LINE for line in message.splitlines()):
        return "long", f"{len(message)} characters: {message[:500]}"
    folders = [folder for folder in file.parents if folder.is_relative_to(root) and (folder != root or file.parent == root)]
    if file.name not in message and not any(str(folder) in message for folder in folders):
        return "unnamed", message
    return "refused", message
