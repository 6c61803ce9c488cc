"""Reads JSON files of checkpoints, runs and tools, and checks them.

Python's own reader takes NaN and Infinity, and keeps the last of two equal keys. For deep nesting and long numbers it
raises errors of its own. Here each of these raises a CheckpointError: one sentence that names the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.quoting import quoted

LARGEST = 64 << 20
"""Most bytes of a JSON file; vocabularies and indices of shards take a few million."""
DEPTH = 64
"""Most levels of objects and lists inside each other; configurations have five or so."""
CONTAINERS = dict, list
DIGITS = 32
"""Most digits of an integer; the largest that occurs, a size in bytes, has 20."""


def read_json(path: Path, why: str = "", *, finite: bool = True) -> dict[str, Any]:
    """Returns a file's JSON object. Raises CheckpointError, which names the file, if the file is absent or damaged.

    Args:
      why: what the file is needed for, for the message about an absent file.
      finite: refuse numbers that are not finite. False is for measurements, which may be NaN.
    """
    try:
        with path.open("rb") as file:
            contents = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file" + (f"; {why}" if why else "")) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(contents) > LARGEST:
        raise CheckpointError(f"{path}: expected a JSON object of at most {LARGEST >> 20} MiB, the file is larger")
    return parse_object(contents, str(path), finite=finite)


def parse_object(contents: bytes | str, where: str, *, finite: bool = True) -> dict[str, Any]:
    """Returns a JSON object. Raises CheckpointError, which begins with `where`: a file, or a part of a file."""
    found = parse_json(contents, where, finite=finite)
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found a {type(found).__name__}")
    return found


def parse_json(contents: bytes | str, where: str, *, finite: bool = True, keep: Collection[str] = ()) -> Any:
    """Returns a JSON value with unique keys, at most DEPTH levels and, unless `finite` is False, finite numbers.

    Args:
      keep: keys to keep. The others are dropped at once, which saves memory for a large file. Default: all.

    Raises CheckpointError, which begins with `where`.
    """
    numbers = {"parse_float": _finite, "parse_constant": _refused} if finite else {}
    try:
        text = contents.decode("utf-8-sig") if isinstance(contents, bytes) else contents
        found = json.loads(text, object_pairs_hook=partial(_unique, keep=keep), parse_int=_whole, **numbers)
        if _deeper_than(found, DEPTH):
            raise RecursionError
    except RecursionError:
        raise CheckpointError(
            f"{where}: not JSON that is read: more than {DEPTH} objects or lists inside each other"
        ) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError too
        raise CheckpointError(f"{where}: not JSON: {error}") from None
    return found


def _unique(pairs: list[tuple[str, Any]], keep: Collection[str]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = [name for name, _ in pairs if name in seen or seen.add(name)]
        raise ValueError(f"{', '.join(map(quoted, twice[:8]))} occurs twice in one object")
    return {name: value for name, value in pairs if name in keep} if keep else entries


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, {digits[:8]}...; expected at most {DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {quoted(digits)} is larger than any float")
    return number


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _deeper_than(value: Any, levels: int) -> bool:
    """Whether objects and lists are nested in more than `levels` levels.

    The search goes level by level: a call for each part of a large file would take a third of the time of reading it.
    """
    parts = [value] if isinstance(value, CONTAINERS) else []
    while parts and levels:
        within = (each for part in parts for each in (part.values() if isinstance(part, dict) else part))
        parts = [each for each in within if isinstance(each, CONTAINERS)]
        levels -= 1
    return bool(parts)
