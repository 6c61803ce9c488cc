"""Runs the steps of the paper one after the other. What a step found is kept, so that an interrupted run goes on."""

from __future__ import annotations

import json
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
        kept = folder / DIRECTORY / f"{step.name}.json"
        if not kept.is_file():
            with shown(step) as on_progress:
                values = step.measure(subject, folder, on_progress)
            write_whole(folder / DIRECTORY, kept, json.dumps(values, indent=1).encode())
        found[step.name] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def presented(subject: Subject, found: dict[str, dict[str, Any]]) -> list[Part]:
    """Returns the sections of the page."""
    return [step.present(subject, found) for step in STEPS]
