"""At which noise levels MAGNET trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGEST_MEAN = 100
"""Of a logit: far beyond it every level is 0 or 1."""


@dataclass(frozen=True)
class NoiseLevels:
    """Density of the noise levels, see `flow.logit_normal_sigmas`; shift null: the checkpoint's schedule's."""

    mean: float = 0.0
    std: float = 0.5
    shift: float | None = None

    def __post_init__(self):
        if found := self.problems():
            raise ValueError("\n".join(found))

    def problems(self) -> list[str]:
        """What does not fit, a sentence each."""
        found = []
        if not -LARGEST_MEAN <= self.mean <= LARGEST_MEAN:
            found.append(f"noise_levels.mean is {self.mean}; expected -{LARGEST_MEAN} to {LARGEST_MEAN}")
        for name in ("std", "shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                found.append(f"noise_levels.{name} is {value}; expected a finite number, more than 0")
        return found
