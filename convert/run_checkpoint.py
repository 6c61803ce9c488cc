"""Reads and checks the records of a training run's checkpoint, and checks its arrays by their checksums.

<step>/state       the arrays, written by Orbax, whose own checks cover their index and not their numbers
<step>/checksums   checksums of every array, and of each record below
<step>/data        the number of batches before this checkpoint
<step>/config      the resolved configuration
<step>/metrics     the metrics of the evaluation at this checkpoint, if there was one
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
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.quoting import cut, quoted

STATE, CHECKSUMS, DATA, CONFIG, METRICS = "state", "checksums", "data", "config", "metrics"
NOTES = "_CHECKPOINT_METADATA"
"""Orbax's own file of versions and times. Orbax also reads checkpoints without it."""
NOTED: dict[str, type | tuple[type, ...]] = {
    "item_handlers": (dict, str),
    "metrics": dict,
    "performance_metrics": dict,
    "init_timestamp_nsecs": int,
    "commit_timestamp_nsecs": int,
    "custom_metadata": dict,
}
"""Types that Orbax expects of the values in NOTES; each may also be null."""


def checksums_to_keep(state: Any, records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Returns what `CHECKSUMS` holds. If several processes hold the arrays, all of them must call this together."""
    return {"arrays": checksums(state), "records": {name: _checksum(values) for name, values in records.items()}}


def read_record(checkpoint: Path, name: str) -> dict[str, Any]:
    """Returns `DATA`, `CONFIG` or `METRICS` of a checkpoint. Raises CheckpointError if it is absent or damaged."""
    file = _file(checkpoint, name)
    found = read_json(file, finite=name != METRICS)
    kept = _kept(checkpoint)
    if kept is not None and kept["records"].get(name) != _checksum(found):
        raise CheckpointError(f"{file} is damaged: it is not what was written, by its checksum in {CHECKSUMS}")
    return found


def has_record(checkpoint: Path, name: str) -> bool:
    """Whether a checkpoint has this record, sound or damaged."""
    return os.path.lexists(checkpoint / name)


def check_notes(checkpoint: Path) -> None:
    """Raises CheckpointError when a checkpoint has `NOTES` and they are damaged."""
    file = checkpoint / NOTES
    if not os.path.lexists(file):
        return
    for name, value in read_json(file).items():
        if value is not None and not isinstance(value, NOTED.get(name, object)):
            raise CheckpointError(f"{file} is damaged: {cut(name)} is {quoted(value)}")


def check_arrays(checkpoint: Path, arrays: Any, *, below: str = "") -> bool:
    """Compares arrays with the checkpoint's checksums. Returns False if the checkpoint has none.

    Args:
      arrays: the whole state, or the arrays whose names begin with `below`, without that beginning.

    Raises:
      CheckpointError: arrays are not what was written; the message names the first five.
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
    """Adds the metrics of a later evaluation. Whatever interrupts this, the checkpoint has all of them or none."""
    kept = _kept(checkpoint)
    if kept is not None:
        kept["records"][METRICS] = _checksum(metrics)
        _replace(_file(checkpoint, CHECKSUMS), kept)
    staged = checkpoint / f"{METRICS}.partial"
    staged.mkdir(exist_ok=True)
    _replace(staged / METRICS, dict(metrics))
    staged.replace(checkpoint / METRICS)


def score(checkpoint: Path, metric: str) -> float | None:
    """Returns one metric of a checkpoint's evaluation.

    Returns None if there was no evaluation or the metric is not finite; such a checkpoint is never the best. Raises
    CheckpointError when the record is damaged.
    """
    return finite(read_record(checkpoint, METRICS), metric) if has_record(checkpoint, METRICS) else None


def finite(metrics: Mapping[str, Any] | None, metric: str) -> float | None:
    """Returns a metric if it is there and is a finite number; otherwise None."""
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
    """Returns a checkpoint's checksums; None for a checkpoint from before there were any."""
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
    """Returns a checksum that is the same before writing and after reading.

    JSON turns tuples into lists, and keys that are numbers into text.
    """
    plain = json.loads(json.dumps(values))
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"
