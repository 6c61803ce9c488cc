"""Runs the steps of the paper one after the other. What a step found is kept, so that an interrupted run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

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
            kept = json.dumps({"step": step.name, "found": values}, indent=1).encode()
            write_whole(folder / DIRECTORY, _file(step, folder), kept)
            values = json.loads(kept)["found"]  # as the next run would read it
        found[step.name] = values
    return found


def kept_values(step: Step, folder: Path) -> dict[str, Any] | None:
    """Returns what an interrupted run found in a step; None if it did not finish it, or files are damaged or gone."""
    try:
        kept = json.loads(_file(step, folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(kept, dict) and kept.get("step") == step.name and isinstance(kept.get("found"), dict)
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
