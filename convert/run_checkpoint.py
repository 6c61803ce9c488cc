"""What a training run's checkpoint says beside its arrays, and whether all of it is what was written.

<step>/state       arrays (Orbax, whose own checks cover their index and not their numbers)
<step>/checksums   of every array, and of each record below
<step>/data        how many batches came before
<step>/config      the resolved configuration
<step>/metrics     of the evaluation after that step, if there was one
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seg4diff_jax.checksums import checksums
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import cut, quoted, read_json

STATE, CHECKSUMS, DATA, CONFIG, METRICS = "state", "checksums", "data", "config", "metrics"
NOTES = "_CHECKPOINT_METADATA"
"""Orbax's own, of versions and times; it reads checkpoints that have none."""
NOTED: dict[str, type | tuple[type, ...]] = {
    "item_handlers": (dict, str),
    "metrics": dict,
    "performance_metrics": dict,
    "init_timestamp_nsecs": int,
    "commit_timestamp_nsecs": int,
    "custom_metadata": dict,
}
"""What Orbax wants each of them to be, or null."""


def checksums_to_keep(state: Any, records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """What `CHECKSUMS` holds. Of arrays that lie with several processes all of these must ask for it together."""
    return {"arrays": checksums(state), "records": {name: _checksum(values) for name, values in records.items()}}


def read_record(checkpoint: Path, name: str) -> dict[str, Any]:
    """`DATA`, `CONFIG` or `METRICS` of a checkpoint. Raises CheckpointError when it is absent or damaged."""
    file = _file(checkpoint, name)
    found = read_json(file, finite=name != METRICS)
    kept = _kept(checkpoint)
    if kept is not None and kept["records"].get(name) != _checksum(found):
        raise CheckpointError(f"{file} is damaged: it is not what was written, by its checksum in {CHECKSUMS}")
    return found


def has_record(checkpoint: Path, name: str) -> bool:
    """Whether there is one, sound or not."""
    return os.path.lexists(checkpoint / name)


def check_notes(checkpoint: Path) -> None:
    """Raise CheckpointError when a checkpoint's `NOTES` are there and damaged."""
    file = checkpoint / NOTES
    if not os.path.lexists(file):
        return
    for name, value in read_json(file).items():
        if value is not None and not isinstance(value, NOTED.get(name, object)):
            raise CheckpointError(f"{file} is damaged: {cut(name)} is {quoted(value)}")


def check_arrays(checkpoint: Path, arrays: Any, *, below: str = "") -> bool:
    """Whether the checkpoint has checksums, which are then those of the arrays.

    Args:
      arrays: the whole state, or what is `below` a name of it.

    Raises:
      CheckpointError: arrays are not what was written; all are named.
    """
    kept = _kept(checkpoint)
    if kept is None:
        return False
    expected = {name: value for name, value in kept["arrays"].items() if name.startswith(below)}
    found = {below + name: value for name, value in checksums(arrays).items()}
    if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        listing = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise CheckpointError(
            f"{checkpoint / STATE} is damaged: of step {checkpoint.name} {listing} "
            f"{'is' if len(wrong) == 1 else 'are'} not what was written, by the checksums beside it"
        )
    return True


def add_metrics(checkpoint: Path, metrics: Mapping[str, float]) -> None:
    """Those of an evaluation that came later. Whatever stops this, the checkpoint has all of them or none."""
    kept = _kept(checkpoint)
    if kept is not None:
        kept["records"][METRICS] = _checksum(metrics)
        _replace(_file(checkpoint, CHECKSUMS), kept)
    staged = checkpoint / f"{METRICS}.partial"
    staged.mkdir(exist_ok=True)
    _replace(staged / METRICS, dict(metrics))
    staged.replace(checkpoint / METRICS)


def score(checkpoint: Path, metric: str) -> float | None:
    """Of its evaluation; None where it was not evaluated, or the score is no finite number: such a one is never best.

    Raises CheckpointError when what is recorded of it is damaged.
    """
    return finite(read_record(checkpoint, METRICS), metric) if has_record(checkpoint, METRICS) else None


def finite(metrics: Mapping[str, Any] | None, metric: str) -> float | None:
    """A metric where there is one and it is a finite number."""
    value = (metrics or {}).get(metric)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _replace(file: Path, values: Mapping[str, Any]) -> None:
    staged = file.with_name(f"{file.name}.partial")
    staged.write_text(json.dumps(values), encoding="utf-8")
    staged.replace(file)


def _file(checkpoint: Path, name: str) -> Path:
    return checkpoint / name / (METRICS if name == METRICS else "metadata")


def _kept(checkpoint: Path) -> dict[str, dict[str, str]] | None:
    """None of a checkpoint of before there were any."""
    file = _file(checkpoint, CHECKSUMS)
    if not file.parent.is_dir():
        return None
    kept = read_json(file)
    for part in ("arrays", "records"):
        values = kept.get(part)
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise CheckpointError(f"{file} is damaged: expected checksums of {part}")
    return kept


def _checksum(values: Mapping[str, Any]) -> str:
    """The same of what is written and of what is read back: tuples come back as lists, names of numbers as text."""
    plain = json.loads(json.dumps(values))
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"
