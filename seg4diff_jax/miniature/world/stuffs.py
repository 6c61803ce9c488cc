"""The stuffs of the synthetic world: textures without an outline, which differ in pattern alone.

A texture is a map of tones in 0..1 over the whole picture. Tones become colours later; tone 0 is the main colour. `x`
[1, columns] and `y` [rows, 1] are positions in pixels of a picture of side 128.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from seg4diff_jax.miniature.world.draws import Draws, Real

SIDE = 128
TABLE = 48
"""Side of a table of random numbers. No texture has more cells along a side."""
TextureRow = Float[np.ndarray, "1 columns"]
Column = Float[np.ndarray, "rows 1"]
Plane = Float[np.ndarray, "rows columns"]


def _smooth_noise(x: TextureRow, y: Column, wide: Real, high: Real, draws: Draws) -> Plane:
    """Returns smooth noise in 0..1, with hills of about `wide` x `high` pixels (quadratic B-splines of a table)."""

    def weights(position: Float[np.ndarray, " n"], period: Real) -> Float[np.ndarray, "n knots"]:
        knots = np.arange(math.ceil(SIDE / period) + 2, dtype=np.float32) - 0.5
        away = np.abs(position[:, None] / period - knots)
        return np.where(away < 0.5, 0.75 - away**2, 0.5 * np.maximum(1.5 - away, 0) ** 2)

    down, across = weights(y[:, 0], high), weights(x[0], wide)
    return down @ draws.table(down.shape[1], across.shape[1]) @ across.T


def _whole(position: Float[np.ndarray, "*shape"]) -> np.ndarray:
    return np.floor(position).astype(np.intp)


def _scattered(
    x: TextureRow, y: Column, cell: Real, jitter: Real, draws: Draws
) -> tuple[Plane, Plane, Callable[[Real, Real], Plane]]:
    """Returns distances along x and along y to one point per square cell, off its middle by up to `jitter` cells.

    Also returns a function that makes a map of random numbers between two limits, one number per cell.
    """
    u, v = x / cell + draws.unit(), y / cell + draws.unit()
    row, column = _whole(v[:, 0]), _whole(u[0])

    def per_cell(low: Real, high: Real) -> Plane:
        return (low + (high - low) * draws.table(TABLE, TABLE))[row][:, column]

    dx = cell * (u - column - per_cell(0.5 - jitter, 0.5 + jitter))
    dy = cell * (v - row[:, None] - per_cell(0.5 - jitter, 0.5 + jitter))
    return dx, dy, per_cell


def _brick(x: TextureRow, y: Column, draws: Draws) -> Plane:
    """Rows of long bricks, each row shifted by half a brick."""
    high = draws.uniform(7.5, 9.5)
    wide, mortar = 2.1 * high, draws.uniform(1.5, 2)
    v = y / high + draws.unit()
    row = _whole(v)
    u = x / wide + draws.unit() + 0.5 * (row % 2)
    column = _whole(u)
    shade = 0.4 * draws.table(TABLE, TABLE)[row, column]
    gap = ((u - column) * wide < mortar) | ((v - row) * high < mortar)
    return np.where(gap, np.float32(1), shade)


def _grass(x: TextureRow, y: Column, draws: Draws) -> Plane:
    """Upright blades, pointed at the top."""
    wide, high = draws.uniform(3.2, 4.2), draws.uniform(11, 14)
    u = (x + 10 * _smooth_noise(x, y, 24, 16, draws)) / wide
    column = _whole(u)
    v = y / high + draws.table(1, TABLE)[0, column]
    row = _whole(v)
    shade = 0.3 + 0.7 * draws.table(TABLE, TABLE)[row, column]
    return np.where(np.abs(u - column - 0.5) < 0.55 * (v - row), shade, np.float32(0))


def _sand(x: TextureRow, y: Column, draws: Draws) -> Plane:
    """Grains of many sizes and shades."""
    dx, dy, per_cell = _scattered(x, y, draws.uniform(4, 5), 0.25, draws)
    shade = per_cell(0.15, 1)
    return np.where(dx * dx + dy * dy < per_cell(0.8, 4.5), shade, np.float32(0))


def _sky(x: TextureRow, y: Column, draws: Draws) -> Plane:
    """Clouds with soft edges over a slope from top to bottom."""
    clouds = 0.65 * _smooth_noise(x, y, 34, 18, draws) + 0.35 * _smooth_noise(x, y, 17, 9, draws)
    return np.clip(np.maximum(5 * (clouds - 0.5), 0.3 * y / SIDE), 0, 1)


def _snow(x: TextureRow, y: Column, draws: Draws) -> Plane:
    """Flakes with six arms, scattered."""
    dx, dy, per_cell = _scattered(x, y, draws.uniform(11, 13), 0.12, draws)
    arms = np.minimum(np.abs(0.5 * dx + 0.87 * dy), np.abs(0.5 * dx - 0.87 * dy))
    return ((np.minimum(arms, np.abs(dx)) < 0.75) & (dx * dx + dy * dy < per_cell(10, 28))).astype(np.float32)


def _tile(x: TextureRow, y: Column, draws: Draws) -> Plane:
    """Square tiles with a diamond in each."""
    side, joint = draws.uniform(13, 16), draws.uniform(1.3, 1.8)
    u, v = x / side + draws.unit(), y / side + draws.unit()
    across, down = np.abs(u - np.floor(u) - 0.5), np.abs(v - np.floor(v) - 0.5)
    tone = np.where(across + down < 0.3, np.float32(0.75), np.float32(0))
    tone[np.maximum(across, down) > 0.5 - joint / 2 / side] = 1
    return tone


def _water(x: TextureRow, y: Column, draws: Draws) -> Plane:
    """Ripples that run across and bend."""
    bend = 2.2 * _smooth_noise(x, y, 9, 24, draws)
    crests = np.sin((2 * math.pi) * (y / draws.uniform(8, 10.5) + bend))
    return np.maximum(crests, 0) ** 2


def _wood(x: TextureRow, y: Column, draws: Draws) -> Plane:
    """Upright planks with grain along them."""
    wide, seam = draws.uniform(20, 28), draws.uniform(1.5, 2)
    u = x / wide + draws.unit()
    plank = _whole(u[0])
    shift = 4 * draws.table(1, TABLE)[:, plank]
    grain = x / draws.uniform(4, 5) + 3 * _smooth_noise(x, y, 12, 40, draws) + shift
    tone = 0.35 + 0.35 * np.sin(2 * math.pi * grain) + 0.3 * shift / 4 - 0.15
    return np.where((u - plank) * wide < seam, np.float32(1), np.clip(tone, 0, 1))


TEXTURES: dict[str, Callable[[TextureRow, Column, Draws], Plane]] = {
    "brick": _brick,
    "grass": _grass,
    "sand": _sand,
    "sky": _sky,
    "snow": _snow,
    "tile": _tile,
    "water": _water,
    "wood": _wood,
}
