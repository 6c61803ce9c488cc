"""Checks the losses while later steps are computed, and averages them for the log."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from seg4diff_jax.training.errors import TrainingError

IN_FLIGHT = 2
"""Number of steps that may be in progress before the oldest one's loss is read."""


class Pending(NamedTuple):
    step: int
    metrics: dict[str, Any]
    items: np.ndarray


class Watch:
    """Checks that every loss is finite, and averages the losses. It runs a few steps late, so the device need not wait.

    Args:
      item: returns the name of an item, from its number, for error messages.
    """

    def __init__(self, item: Callable[[int], str]):
        self._item = item
        self._pending: deque[Pending] = deque()
        self._seen: list[dict[str, float]] = []

    def add(self, step: int, metrics: dict[str, Any], items: np.ndarray) -> None:
        self._pending.append(Pending(step, metrics, np.asarray(items)))
        self.check(IN_FLIGHT)

    def check(self, left: int = 0) -> None:
        """Raises TrainingError if the loss or gradient of a step is not finite. Leaves the last `left` steps unread."""
        while len(self._pending) > left:
            step, metrics, items = self._pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            bad = [name for name in ("loss", "gradient_norm") if not np.isfinite(values[name])]
            if bad:
                if jax.process_count() > 1:
                    items = multihost_utils.process_allgather(items)
                named = ", ".join(self._item(item) for item in dict.fromkeys(items.ravel().tolist()))
                parts = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
                raise TrainingError(
                    f"step {step}: {' and '.join(bad)} not finite ({parts}). The batch held {named}. The checkpoints "
                    "up to now are intact: look at these items, lower optimizer.learning_rate or optimizer.clip, and "
                    "continue with --resume"
                )
            self._seen.append(values)

    def take(self) -> dict[str, float]:
        """Returns the mean of each metric since the last call."""
        self.check()
        names = sorted(self._seen[0], key=lambda name: name != "loss")
        means = {name: float(np.mean([values[name] for values in self._seen])) for name in names}
        self._seen = []
        return means
