"""Chooses colours for classes and heat maps: far apart, or evenly spaced, in the perceptual colour space OKLab."""

from __future__ import annotations

from functools import cache

import numpy as np
from jaxtyping import Float, UInt8

PALETTE_SIZE = 256
"""Number of colours: as many as an image file with a palette can hold."""

HAND_PICKED = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 90, 190),
    (213, 80, 0),
    (205, 90, 165),
    (95, 50, 25),
    (150, 70, 220),
    (150, 215, 60),
    (200, 20, 60),
    (150, 250, 230),
    (25, 20, 110),
    (255, 165, 150),
    (0, 85, 45),
    (235, 30, 220),
    (190, 185, 255),
    (125, 125, 20),
    (0, 120, 130),
    (255, 225, 190),
)
"""The first colours of classes. People with red-green colour blindness can tell the first eight apart."""

HEAT = ((12, 7, 60), (70, 10, 125), (150, 25, 125), (215, 60, 80), (250, 130, 40), (252, 200, 60), (252, 253, 190))
"""Anchor colours of the heat map, from low to high."""
NEUTRAL_LIGHTNESS, NEUTRAL_CHROMA = (0.5, 0.87), 0.025
"""Range of lightness of the neutral colours, in OKLab, and the chroma of those that have a slight hue."""
TINT_PALE, TINT_DEEP = (244, 248, 253), (20, 66, 128)
PAGE_COLORS = {
    "ink": "#1b2026",
    "faint": "#59626d",
    "line": "#e1e5ea",
    "paper": "#ffffff",
    "ground": "#f4f6f8",
    "best": "#2b6cb0",
    "second": "#c2410c",
    "third": "#0f766e",
    "dull": "#aeb8c4",
    "track": "#eef1f4",
}
"""Colours of the report and its plots. `best`, `second` and `third` are the ways in which classes were asked for."""

_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(colors: UInt8[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """Converts sRGB bytes to OKLab (Ottosson 2020): lightness 0..1, green to red, blue to yellow."""
    return np.cbrt(_linear(colors) @ _TO_CONES.T) @ _TO_LAB.T


def _linear(colors: UInt8[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    encoded = colors / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def _srgb(lab: Float[np.ndarray, "*shape 3"]) -> UInt8[np.ndarray, "*shape 3"]:
    linear = np.clip((lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_CONES).T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(np.uint8)


@cache
def palette() -> UInt8[np.ndarray, "colors 3"]:
    """Returns 256 distinct colours, always the same: those picked by hand, then each the farthest from all before."""
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = oklab(candidates)
    visible = (lab[:, 0] > 0.3) & (lab[:, 0] < 0.95)  # near black and near white are lost in photographs
    candidates, lab = candidates[visible], lab[visible]
    chosen = [np.array(color, np.uint8) for color in HAND_PICKED]
    distance = np.min([np.linalg.norm(lab - oklab(color), axis=-1) for color in chosen], axis=0)
    while len(chosen) < PALETTE_SIZE:
        farthest = int(distance.argmax())
        chosen.append(candidates[farthest])
        distance = np.minimum(distance, np.linalg.norm(lab - lab[farthest], axis=-1))
    return np.stack(chosen)


def class_colors(count: int) -> UInt8[np.ndarray, "count 3"]:
    """Returns a colour for each class. Colours repeat after 256 classes."""
    return palette()[np.arange(count) % PALETTE_SIZE]


def neutral_colors(count: int, beside: UInt8[np.ndarray, "others 3"]) -> UInt8[np.ndarray, "count 3"]:
    """Returns greys, some with a slight hue. Each is the farthest from all before it and from the colours `beside`."""
    angles = np.arange(6) * np.pi / 3
    tinges = NEUTRAL_CHROMA * np.array([(0, 0), *zip(np.cos(angles), np.sin(angles), strict=True)])
    levels = np.linspace(*NEUTRAL_LIGHTNESS, max(12, -(-count // len(tinges))))
    candidates = np.array([(level, *tinge) for level in levels for tinge in tinges])
    distance = np.min([np.linalg.norm(candidates - other, axis=-1) for other in oklab(beside)], axis=0)
    chosen = []
    for _ in range(count):
        chosen.append(candidates[distance.argmax()])
        distance = np.minimum(distance, np.linalg.norm(candidates - chosen[-1], axis=-1))
    return _srgb(np.array(chosen).reshape(-1, 3))


def ink_on(color: UInt8[np.ndarray, 3]) -> tuple[int, int, int]:
    """Returns black or white, whichever is easier to read on a colour. The contrast is at least WCAG's 4.5 to 1."""
    luminance = _linear(color) @ np.array([0.2126, 0.7152, 0.0722])
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


@cache
def heat_map() -> UInt8[np.ndarray, "steps 3"]:
    """Returns 256 colours from dark violet over red to pale yellow. Their lightness rises in equal steps."""
    anchors = oklab(np.array(HEAT, np.uint8))
    lightness = np.linspace(anchors[0, 0], anchors[-1, 0], 256)
    rest = [np.interp(lightness, anchors[:, 0], anchors[:, axis]) for axis in (1, 2)]
    return _srgb(np.stack([lightness, *rest], axis=-1))


def heat_colors(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Returns the heat map's colours of values in 0..1."""
    return heat_map()[np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)]


def tint(share: float) -> UInt8[np.ndarray, 3]:
    """Returns a blue for a share of 0..1: nearly white for 0, darker for larger shares, in equal steps of lightness."""
    ends = oklab(np.array([TINT_PALE, TINT_DEEP], np.uint8))
    return _srgb(ends[0] + (ends[1] - ends[0]) * float(np.clip(share, 0, 1)))


def hexadecimal(color: UInt8[np.ndarray, 3] | tuple[int, int, int]) -> str:
    """Returns a colour as style sheets write it, such as `#1b2026`."""
    return "#{:02x}{:02x}{:02x}".format(*color)
