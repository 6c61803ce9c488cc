"""Runs the steps of the paper one after the other. What a step found is kept, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.interrupted_runs import DIRECTORY, write_whole
from seg4diff_jax.numerics import settled
from seg4diff_jax.reproduction import attention_budget, components, expert, finetuning, masks, pads, perturbation
from seg4diff_jax.reproduction.parts import Part, Step
from seg4diff_jax.reproduction.subject import OnProgress, Subject

STEPS: tuple[Step, ...] = (
    attention_budget.STEP,
    components.STEP,
    perturbation.STEP,
    masks.STEP,
    expert.STEP,
    pads.STEP,
    finetuning.STEP,
)
"""In the paper's order."""
Shown = Callable[[Step], AbstractContextManager[OnProgress]]
"""Shows how far a step is."""


@settled()
def measured_steps(subject: Subject, folder: Path, shown: Shown) -> dict[str, dict[str, Any]]:
    """Measures every step that has not been measured yet, and returns what all found, by name.

    Args:
      folder: where pictures are written, and, in its `progress`, what each step found.

    Raises as the steps do: ValueError, OSError or FloatingPointError.
    """
    found: dict[str, dict[str, Any]] = {}
    for step in STEPS:
        if step.measure is None:
            continue
        values = kept_values(step, folder)
        if values is None:
            with shown(step) as on_progress:
                values = step.measure(subject, folder, on_progress)
            values = json.loads(json.dumps(values))  # as the next run would read it
            keep(step, folder, values)
        found[step.name] = values
    return found


def keep(step: Step, folder: Path, values: dict[str, Any]) -> None:
    """Writes what was found in a step, with a checksum."""
    kept = {"step": step.name, "checksum": _checksum(values), "found": values}
    write_whole(folder / DIRECTORY, _file(step, folder), json.dumps(kept, indent=1).encode())


def _checksum(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def kept_values(step: Step, folder: Path) -> dict[str, Any] | None:
    """Returns what an interrupted run found in a step; None if it did not finish it, or files are damaged or gone."""
    try:
        kept = read_json(_file(step, folder))
    except CheckpointError:
        return None
    own = {"step": step.name, "checksum": _checksum(kept.get("found"))}
    whole = all(kept.get(name) == value for name, value in own.items())
    return kept["found"] if whole and all((folder / name).is_file() for name in step.pictures) else None


def remove_former(folder: Path) -> None:
    """Removes the files of an earlier run, and nothing else."""
    for step in STEPS:
        for path in (_file(step, folder), *(folder / name for name in step.pictures)):
            path.unlink(missing_ok=True)
    for name in (perturbation.PICTURES, *finetuning.FOLDERS):
        shutil.rmtree(folder / name, ignore_errors=True)


def _file(step: Step, folder: Path) -> Path:
    return folder / DIRECTORY / f"{step.name}.json"


def presented(subject: Subject, found: dict[str, dict[str, Any]]) -> list[Part]:
    """Returns the sections of the page."""
    return [step.present(subject, found) for step in STEPS]
