"""Random colours with names. What they paint, a thing or a stuff, has no part in their choice."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from seg4diff_jax.miniature.world.draws import Draws

COLORS = {
    "red": (205, 40, 40),
    "orange": (240, 140, 40),
    "yellow": (240, 215, 60),
    "green": (55, 150, 60),
    "teal": (50, 170, 170),
    "blue": (50, 80, 205),
    "purple": (125, 60, 170),
    "pink": (240, 150, 190),
    "brown": (120, 75, 40),
    "white": (238, 238, 238),
    "gray": (130, 130, 130),
    "black": (25, 25, 25),
}
JITTER = 18
"""Each channel of a colour differs from its name's by at most this much."""
TONES = 256


class Palette(NamedTuple):
    """The colour of each tone, and the names of the colours at tone 0 and at the last tone."""

    colors: UInt8[np.ndarray, "tones 3"]
    main: str
    second: str


@cache
def _partners(least: float, most: float) -> dict[str, tuple[str, ...]]:
    """For each colour those whose brightness (Rec. 601, 0..1) differs from its own by an amount within limits."""
    brightness = {name: (0.299 * r + 0.587 * g + 0.114 * b) / 255 for name, (r, g, b) in COLORS.items()}
    return {
        name: tuple(other for other in COLORS if least <= abs(brightness[other] - brightness[name]) <= most)
        for name in COLORS
    }


def palette(draws: Draws, *, contrast: tuple[float, float], without: Collection[str] = ()) -> Palette:
    """A ramp between two colours, every other time by way of a third.

    Args:
      contrast: least and greatest difference in brightness, 0..1, between the two, before the jitter.
      without: names of colours to keep away from, as far as the contrast allows.
    """
    main = draws.choice([name for name in COLORS if name not in without])
    partners = _partners(*contrast)[main]
    second = draws.choice([name for name in partners if name not in without] or partners)
    ends = [_jittered(main, draws), _jittered(second, draws)]
    middle = _jittered(draws.choice(list(COLORS)), draws) if draws.chance(0.5) else (ends[0] + ends[1]) / 2
    anchors = np.stack([ends[0], middle, ends[1]])
    steps = np.linspace(0, 1, TONES)
    ramp = np.stack([np.interp(steps, (0, 0.5, 1), channel) for channel in anchors.T], axis=-1)
    return Palette(np.rint(ramp).astype(np.uint8), main, second)


def _jittered(name: str, draws: Draws) -> np.ndarray:
    return np.clip([channel + draws.uniform(-JITTER, JITTER) for channel in COLORS[name]], 0, 255)
