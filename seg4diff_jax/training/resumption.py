"""What a run is told about the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seg4diff_jax.training.errors import TrainingError


def check_accumulation(before: Mapping[str, Any], accumulate: int) -> None:
    """Raise TrainingError when the configuration that a checkpoint was written with counts other steps."""
    optimizer = before.get("optimizer")
    written = optimizer.get("accumulate", accumulate) if isinstance(optimizer, Mapping) else accumulate
    if written != accumulate:
        raise TrainingError(
            f"optimizer.accumulate is {accumulate}, and the run's checkpoint counts its steps by {written} "
            "batches each: go on with that, or give another run.out"
        )


def remarks(step: int, before: Mapping[str, Any], now: Mapping[str, Any], *, checked: bool) -> list[str]:
    """What a run that is resumed at a step says of it."""
    changed = differences(before, now)
    said = [f"resumed at step {step}" + (f"; changed since: {', '.join(changed)}" if changed else "")]
    if not checked:
        said.append(f"the checkpoint of step {step} has no checksums, as those of earlier versions: it is unchecked")
    return said


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted options whose values differ."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} ({old!r} to {new!r})")
    return found
