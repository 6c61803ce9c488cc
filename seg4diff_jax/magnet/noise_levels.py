"""The noise levels at which MAGNET trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from seg4diff_jax.checked import Checked

LARGEST_MEAN = 100
"""Largest absolute mean of the logits; with larger means all noise levels are 0 or 1."""


@dataclass(frozen=True)
class NoiseLevels(Checked):
    """Density of the noise levels, see `flow.logit_normal_sigmas`.

    Attributes:
      mean: mean of the normal distribution of the logits.
      std: standard deviation of the normal distribution of the logits.
      shift: shift of the noise levels; null: that of the checkpoint's schedule.
    """

    mean: float = 0.0
    std: float = 0.5
    shift: float | None = None

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        found = []
        if not -LARGEST_MEAN <= self.mean <= LARGEST_MEAN:
            found.append(f"noise_levels.mean is {self.mean}; expected -{LARGEST_MEAN} to {LARGEST_MEAN}")
        for name in ("std", "shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                found.append(f"noise_levels.{name} is {value}; expected a finite number, more than 0")
        return found
