"""Messages and checks for runs that are resumed from a checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from seg4diff_jax.training.errors import TrainingError


def check_accumulation(before: Mapping[str, Any], accumulate: int) -> None:
    """Raises TrainingError when the configuration of a checkpoint has another optimizer.accumulate, so other steps."""
    optimizer = before.get("optimizer")
    written = optimizer.get("accumulate", accumulate) if isinstance(optimizer, Mapping) else accumulate
    if written != accumulate:
        raise TrainingError(
            f"optimizer.accumulate is {accumulate}, and the run's checkpoint counts its steps by {written} "
            "batches each: go on with that, or give another run.out"
        )


def remarks(step: int, before: Mapping[str, Any], now: Mapping[str, Any], *, checked: bool) -> list[str]:
    """Returns the messages of a run that is resumed at a step."""
    changed = differences(before, now)
    said = [f"resumed at step {step}" + (f"; changed since: {', '.join(changed)}" if changed else "")]
    if not checked:
        said.append(f"the checkpoint of step {step} has no checksums, as those of earlier versions: it is unchecked")
    return said


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the dotted names of options whose values differ."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} ({old!r} to {new!r})")
    return found


def to_go_on(out: Path, record: Mapping[str, Any]) -> str:
    """Returns a sentence that says how to continue a run that was stopped."""
    if "task" not in record:  # the run was started from Python
        return "go on with resume=True"
    several = " --distributed, in every process" if jax.process_count() > 1 else ""
    return f"go on with python train.py --config {shlex.quote(str(out / 'config.yaml'))} --resume{several}"


NAMED = 4
"""Largest number of files, or of runs, that a message names."""


def found_nothing(out: Path) -> str:
    """Says what `out`, which has no checkpoint, holds, and which runs beside it have checkpoints."""
    if not out.exists():
        said = f"{out} does not exist"
    elif names := sorted(path.name for path in out.iterdir()) if out.is_dir() else []:
        said = f"{out} holds {_several(names)}, and no checkpoint"
    else:
        said = f"{out} is {'empty' if out.is_dir() else 'a file'}"
    others = [
        f"--run.out={shlex.quote(str(path))} (step {steps[-1]})"
        for path in (sorted(out.parent.iterdir()) if out.parent.is_dir() else [])
        if path != out and (steps := _steps(path))
    ]
    if not others:
        return said
    return f"{said}. To go on with a run beside it, stop this one and give {_several(others, 'or')}"


def _steps(run: Path) -> list[int]:
    """Returns the steps of a run's checkpoints, ascending."""
    return sorted(int(path.name) for path in run.glob("checkpoints/[0-9]*") if path.name.isdigit())


def _several(names: list[str], last: str = "and") -> str:
    shown = names[:NAMED] + [f"{len(names) - NAMED} more"] * (len(names) > NAMED)
    return ", ".join(shown[:-1]) + f" {last} {shown[-1]}" if len(shown) > 1 else shown[0]
