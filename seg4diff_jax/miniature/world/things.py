"""The things of the synthetic world. Each has an outline and, inside it, a pattern of its own, independent of colour.

A thing is drawn in its own frame: x to the right and y down from its centre, in pixels of a picture of side 128. It
fits into the disc of its radius. Its pattern is a map of tones in 0..1, which become colours later; tone 0 is the main
colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from seg4diff_jax.miniature.world.draws import Draws

Plane = Float[np.ndarray, "rows columns"]
Drawing = tuple[Bool[np.ndarray, "rows columns"], Float[np.ndarray, "rows columns"]]
"""Which points are inside the outline, and the tones, which have no meaning outside."""


def _bands(position: Plane) -> Plane:
    """Returns alternating bands of 1 and 0, each half a unit long."""
    return ((position - np.floor(position)) < 0.5).astype(np.float32)


def _from_line(position: Plane) -> Plane:
    """Returns the distance, in units, to the nearest whole number."""
    return np.abs(position - np.rint(position))


def _ball(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A ball shaded from a highlight off its middle, with a basketball's seams."""
    shade = np.clip(0.85 - np.hypot(x + 0.35 * radius, y + 0.4 * radius) / (1.5 * radius), 0, 0.75)
    straight = np.minimum(np.abs(x), np.abs(y))
    curved = np.abs(np.hypot(np.abs(x) - 1.15 * radius, y) - 0.62 * radius)
    seams = np.minimum(straight, curved) < 1.0
    return x * x + y * y < radius**2, np.where(seams, np.float32(1), shade)


def _box(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A checkered square."""
    cell = draws.uniform(6, 8)
    phase = draws.unit(), draws.unit()
    checks = np.floor(x / cell + phase[0]) + np.floor(y / cell + phase[1])
    return np.maximum(np.abs(x), np.abs(y)) < 0.7 * radius, _bands(checks / 2)


def _cone(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A triangle with straight stripes along its base."""
    inside = (np.abs(x) < 0.5 * (y + radius)) & (y < 0.6 * radius)
    return inside, _bands(y / draws.uniform(9, 12) + draws.unit())


def _cookie(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A disc with dots in rows."""
    period = draws.uniform(8.5, 11)
    v = y / (0.87 * period) + draws.unit()
    u = x / period + draws.unit() + 0.5 * (np.rint(v) % 2)
    dots = np.hypot(_from_line(u), 0.87 * _from_line(v)) < 0.3
    return x * x + y * y < radius**2, dots.astype(np.float32)


def _cross(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """Two bars with lines along their edges and a spot where they meet."""
    width, length = 0.34 * radius, 0.94 * radius
    a, b = np.abs(x), np.abs(y)
    short, long = np.minimum(a, b), np.maximum(a, b)
    edge = np.where(long < width, np.hypot(width - a, width - b), np.minimum(width - short, length - long))
    spot = long < 0.5 * width
    return (short < width) & (long < length), np.where(spot, np.float32(1), _bands(edge / draws.uniform(5.5, 6.5)))


def _egg(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """An oval, narrower at the top, with zigzag bands."""
    wide = 0.72 * radius + 0.1 * y
    zigzag = 4.5 * 2 * _from_line(x / draws.uniform(9, 12) + draws.unit())
    return (x / wide) ** 2 + (y / radius) ** 2 < 1, _bands((y + zigzag) / draws.uniform(9, 12) + draws.unit())


def _fish(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A body with a tail and an eye, in scales."""
    body = ((x + 0.22 * radius) / (0.76 * radius)) ** 2 + (y / (0.52 * radius)) ** 2 < 1
    tail = (np.abs(y) < 0.9 * (x - 0.25 * radius)) & (x < 0.82 * radius)
    wide = draws.uniform(8, 10)
    high = 0.62 * wide
    u, v = -x / high + draws.unit(), y / wide + draws.unit()
    row = np.floor(u)
    arc = 1.5 * np.sqrt(0.25 - _from_line(v + 0.5 * (row % 2)) ** 2)
    past = u - row - arc
    eye = np.hypot(x + 0.68 * radius, y + 0.12 * radius) < 2.2
    return body | tail, (((past > 0) & (past < 1.7 / high)) | eye).astype(np.float32)


def _heart(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A quilted heart: thin lines along both diagonals."""
    u, v = x / (0.79 * radius), -y / (0.79 * radius) + 0.12
    inside = u * u + (1.15 * v - 0.75 * np.sqrt(np.abs(u))) ** 2 < 1
    period = draws.uniform(11, 14)
    lines = np.minimum(_from_line((x + y) / period + draws.unit()), _from_line((x - y) / period + draws.unit()))
    return inside, (lines < 1.5 / period).astype(np.float32)


def _leaf(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A leaf pointed at both ends, with a rib and slanted veins."""
    inside = np.hypot(np.abs(x) + 0.75 * radius, y) < 1.25 * radius
    period = draws.uniform(7, 9)
    veins = _from_line((y + 0.9 * np.abs(x)) / period + draws.unit()) < 1.3 / period
    return inside, (veins | (np.abs(x) < 1.3)).astype(np.float32)


def _moon(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A crescent with blotches."""
    inside = (x * x + y * y < radius**2) & (np.hypot(x - 0.62 * radius, y) > 0.78 * radius)
    scale = draws.uniform(0.42, 0.55)
    a, b, c, d = (draws.uniform(0, 2 * math.pi) for _ in range(4))
    blotches = np.sin(scale * x + a + 1.6 * np.sin(scale * y + b)) + np.sin(scale * y + c + 1.6 * np.sin(scale * x + d))
    return inside, (blotches > 0.35).astype(np.float32)


def _ring(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A ring with bands across it, like a life buoy; its hole shows what is behind."""
    distance = np.hypot(x, y)
    count = max(4, round(2 * math.pi * 0.73 * radius / draws.uniform(13, 17)))
    inside = (distance < radius) & (distance > 0.46 * radius)
    return inside, _bands(count / (2 * math.pi) * np.arctan2(y, x) + draws.unit())


def _star(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A star with five points, tiled with triangles."""
    points = 5 / (2 * math.pi) * np.arctan2(x, -y)
    turn = np.float32(2 * math.pi / 5) * _from_line(points)
    distance = np.hypot(x, y)
    inner = 0.5 * radius
    notch = inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
    inside = distance * np.sin(turn) * (radius - notch[0]) < (radius - distance * np.cos(turn)) * notch[1]
    high = draws.uniform(7, 9)
    sides = np.floor(y / high) + np.floor((0.866 * x + 0.5 * y) / high) + np.floor((0.866 * x - 0.5 * y) / high)
    return inside, _bands(sides / 2)


def _target(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A disc with rings around its middle."""
    distance = np.hypot(x, y)
    return distance < radius, 1 - _bands((radius - distance) / draws.uniform(9, 12))


def _wheel(x: Plane, y: Plane, radius: float, draws: Draws) -> Drawing:
    """A rim, a hub and spokes."""
    distance = np.hypot(x, y)
    count = max(5, round(2 * math.pi * 0.6 * radius / draws.uniform(9, 12)))
    turn = count / (2 * math.pi) * np.arctan2(y, x)
    spokes = _from_line(turn) * (2 * math.pi / count) * distance < 1.4
    solid = spokes | (distance > radius - max(3, 0.14 * radius)) | (distance < 0.2 * radius)
    return distance < radius, solid.astype(np.float32)


class Thing(NamedTuple):
    """How to draw a thing, and the factor of its radius that gives all things about the same area."""

    draw: Callable[[Plane, Plane, float, Draws], Drawing]
    stretch: float


DRAWN: dict[str, Thing] = {
    "ball": Thing(_ball, 0.84),
    "box": Thing(_box, 1.07),
    "cone": Thing(_cone, 1.32),
    "cookie": Thing(_cookie, 0.84),
    "cross": Thing(_cross, 1.03),
    "egg": Thing(_egg, 0.98),
    "fish": Thing(_fish, 1.22),
    "heart": Thing(_heart, 1.13),
    "leaf": Thing(_leaf, 1.25),
    "moon": Thing(_moon, 1.12),
    "ring": Thing(_ring, 0.94),
    "star": Thing(_star, 1.22),
    "target": Thing(_target, 0.84),
    "wheel": Thing(_wheel, 0.84),
}
