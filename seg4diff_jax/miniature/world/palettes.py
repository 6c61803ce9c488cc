"""Random colours with names. The choice does not depend on the class that is painted."""

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
"""Largest difference, in each channel, between a drawn colour and the one in `COLORS`."""
TONES = 256


class Palette(NamedTuple):
    """The colour of each tone, and the names of the colours of the first and the last tone."""

    colors: UInt8[np.ndarray, "tones 3"]
    main: str
    second: str


@cache
def _partners(least: float, most: float) -> dict[str, tuple[str, ...]]:
    """Returns for each colour the colours whose brightness (Rec. 601, 0..1) differs by `least` to `most`."""
    brightness = {name: (0.299 * r + 0.587 * g + 0.114 * b) / 255 for name, (r, g, b) in COLORS.items()}
    return {
        name: tuple(other for other in COLORS if least <= abs(brightness[other] - brightness[name]) <= most)
        for name in COLORS
    }


def palette(draws: Draws, *, contrast: tuple[float, float], without: Collection[str] = ()) -> Palette:
    """Draws a ramp between two colours, half of the time by way of a third colour.

    Args:
      contrast: least and greatest difference in brightness, 0..1, between the two, before the jitter.
      without: names of colours to avoid, as far as the contrast allows.
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
