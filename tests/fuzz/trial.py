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
LONGEST_LINE, LONGEST_MESSAGE = 1000, 100_000
"""Characters of a refusal. Lists of all tensors have a line for each."""
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
    return hashlib.sha256("".join(_spelled_out(value)).encode()).hexdigest()


def _spelled_out(value: Any) -> Iterator[str]:
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}{hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield f"{key!r}:"
            yield from _spelled_out(value[key])
    elif isinstance(value, list | tuple):
        yield f"{len(value)}["
        for each in value:
            yield from _spelled_out(each)
    elif is_dataclass(value):
        yield from _spelled_out({one.name: getattr(value, one.name) for one in fields(value)})
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


def _shares(files: list[Path]) -> np.ndarray:
    """How often each file is drawn: half of the time they are equal, half of the time their bytes are."""
    sizes = np.array([path.stat().st_size for path in files]) + 1
    return (sizes / sizes.sum() + 1 / len(files)) / 2


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
    file = files[random.choice(len(files), p=_shares(files))]
    text = file.read_text("utf-8", "replace") if reader.options else ""
    try:
        said = damage.apply(random, file)
    except Inapplicable:
        return None
    inside = file.relative_to(root)
    done = f"{inside}: {damage.name}: {said}"
    free = not damage.noticed or any(re.search(each, done) for each in reader.free)
    payload.traces.clear()
    text += file.read_text("utf-8", "replace") if reader.options and file.is_file() else ""
    names = [*names_of(root, file, free), *options_of(text, said)]
    verdict, message = _read(reader, root, names, expected, free)
    if payload.traces:
        verdict = "ran"
    elif verdict == "refused" and (left := [path.name for path in work.iterdir() if path != root]):
        verdict, message = "leftover", f"{', '.join(left)}; {message}"
    return Trial(f"{name}-{case}: {done}", verdict, message)


def names_of(root: Path, file: Path, free: bool) -> list[str]:
    """What a refusal may name: the file, or a folder of the input that holds it.

    A file that does not show its damage misleads to others, and any of them may be named.
    """
    inside = [folder for folder in file.parents if root in folder.parents]
    return [file.name, *map(str, [root] if free else inside or [root])]


def options_of(text: str, said: str) -> list[str]:
    """The option whose value is damaged; where that is none in particular, any of the options in a file's text."""
    keys = re.match(r"([\w.]+) (?:=|is absent)", said)
    if text and keys and keys[1] != "all":
        return [key for key in keys[1].split(".")[-2:] if not key.isdigit()]
    return re.findall(r"\w{3,}(?=:)", text)


def _read(reader: Reader, root: Path, names: list[str], expected: str, free: bool) -> tuple[Verdict, str]:
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
        return _refusal(reader, names, error, errors.getvalue())
    if found == expected:
        return "equal", ""
    return "undetectable" if free else "silent", ""


def _refusal(reader: Reader, names: list[str], error: BaseException, printed: str) -> tuple[Verdict, str]:
    left = isinstance(error, SystemExit)
    message = printed.split("error:", 1)[-1] if left else str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(where.filename).is_relative_to(ROOT) and (where.line or "").startswith("raise ")
    if not left and not (ours and type(error) in reader.errors):
        return "traceback", f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {message}"
    if len(message) > LONGEST_MESSAGE or any(len(line) > LONGEST_LINE for line in message.splitlines()):
        return "long", f"{len(message)} characters: {message[:500]}"
    return ("refused" if any(name in message for name in names) else "unnamed"), message
