"""Composes a scene: places its stuffs and things in layers, and draws the picture and the label map from the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, UInt8

from seg4diff_jax.miniature.world.draws import Draws
from seg4diff_jax.miniature.world.palettes import TONES, Palette, palette
from seg4diff_jax.miniature.world.stuffs import SIDE, TEXTURES
from seg4diff_jax.miniature.world.things import DRAWN

SAMPLES = 2
"""Samples per pixel and axis. A pixel's colour is the mean of its samples, its label that of most of them."""
COUNTS = {1: 1.5, 2: 3.0, 3: 3.0, 4: 2.5}
"""Number of things that a scene tries to place, with the weight of each number. A few things find no place."""
MOST_STUFFS, MOST_THINGS = 2, max(COUNTS)
TWO_STUFFS = 0.6
TWINS = 0.15
"""Probability that a scene's second thing has the same class as the first."""
RADIUS = (16.0, 31.0)
SMALL, LARGE = 20.0, 27.0
"""A thing is small below the first radius and large above the second, in pixels of a picture of side 128."""
TURN = math.pi / 4
LEAST_SEEN = 0.6
"""Share of a thing that must be visible."""
LEAST_STUFF = 0.06
"""Share of the picture that each stuff must still cover."""
THING_CONTRAST, STUFF_CONTRAST = (0.3, 1.0), (0.18, 0.5)


@dataclass(frozen=True)
class PlacedThing:
    """A thing with its place; `x`, `y` and `radius` are in pixels of a picture of side 128."""

    name: str
    palette: Palette
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        return "small" if self.radius < SMALL else "large" if self.radius > LARGE else ""


@dataclass(frozen=True)
class LaidStuff:
    name: str
    palette: Palette


@dataclass
class Composition:
    """The stuffs and things of a scene, and its layers. Layers are numbered from the rear: stuffs first, then things.

    Things are placed from the front to the rear and take layer numbers downward, so some numbers stay unused.
    """

    layer: UInt8[np.ndarray, "samples samples"]
    tone: UInt8[np.ndarray, "samples samples"]
    stuffs: list[LaidStuff]
    things: list[PlacedThing]
    upright: bool
    """Whether two stuffs lie one above the other, not side by side. The upper or left one comes first."""

    def by_layer(self) -> dict[int, LaidStuff | PlacedThing]:
        front = MOST_STUFFS + MOST_THINGS - 1
        return {**dict(enumerate(self.stuffs)), **{front - order: thing for order, thing in enumerate(self.things)}}


def compose(draws: Draws, size: int) -> Composition:
    """Lays the stuffs and places the things of a scene with a side of `size` pixels."""
    composition = _lay_stuffs(draws, size)
    count = draws.weighted(COUNTS)
    names = draws.shuffled(tuple(DRAWN))[:count]
    if count > 1 and draws.chance(TWINS):
        names[1] = names[0]
    room = [int(np.count_nonzero(composition.layer == layer)) for layer in range(len(composition.stuffs))]
    for name in names:
        _place(composition, name, room, draws)
    return composition


@cache
def _positions(size: int) -> Float[np.ndarray, " samples"]:
    """Returns the positions of the samples along one axis, in pixels of a picture of side 128."""
    return (np.arange(SAMPLES * size, dtype=np.float32) + np.float32(0.5)) * np.float32(SIDE / (SAMPLES * size))


def _lay_stuffs(draws: Draws, size: int) -> Composition:
    x, y = _positions(size)[None], _positions(size)[:, None]
    upright = draws.chance(0.5)
    layer = np.zeros((y.size, x.size), np.uint8)
    names = draws.shuffled(tuple(TEXTURES))[: 2 if draws.chance(TWO_STUFFS) else 1]
    tones = [(TONES - 0.5) * TEXTURES[name](x, y, draws) for name in names]
    if len(names) == 2:
        field = _slope(x, y, upright, draws)
        every = max(1, y.size // 64)
        layer[field > np.quantile(field[::every, ::every], draws.uniform(0.35, 0.65))] = 1
        tones = [np.where(layer, tones[1], tones[0])]
    stuffs: list[LaidStuff] = []
    for name in names:
        taken = [stuff.palette.main for stuff in stuffs]
        stuffs.append(LaidStuff(name, palette(draws, contrast=STUFF_CONTRAST, without=taken)))
    return Composition(layer, tones[0].astype(np.uint8), stuffs, [], upright)


def _slope(
    x: Float[np.ndarray, "1 columns"], y: Float[np.ndarray, "rows 1"], upright: bool, draws: Draws
) -> Float[np.ndarray, "rows columns"]:
    """Returns a map that rises downward if `upright`, else to the right, tilted. Level lines are straight or wavy."""
    angle = draws.uniform(-0.4, 0.4) + (math.pi / 2 if upright else 0)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    if draws.chance(0.4):
        return along
    return along + draws.uniform(3, 9) * np.sin(across * (2 * math.pi / draws.uniform(40, 90)) + draws.uniform(0, 6.3))


def _place(composition: Composition, name: str, room: list[int], draws: Draws) -> None:
    """Draws a thing behind the things already placed, unless too little of it or of a stuff would be visible."""
    radius = draws.uniform(*RADIUS)
    reach = radius * DRAWN[name].stretch
    x, y = _free_place(composition.things, reach, draws)
    positions = _positions(composition.layer.shape[0] // SAMPLES)
    low = np.searchsorted(positions, (x - reach, y - reach))
    high = np.searchsorted(positions, (x + reach, y + reach))
    columns, rows = slice(low[0], high[0]), slice(low[1], high[1])
    turn, mirror = draws.uniform(-TURN, TURN), draws.choice((-1, 1))
    dx, dy = positions[None, columns] - np.float32(x), positions[rows, None] - np.float32(y)
    own_x = mirror * (dx * math.cos(turn) + dy * math.sin(turn))
    own_y = dy * math.cos(turn) - dx * math.sin(turn)
    inside, tone = DRAWN[name].draw(own_x, own_y, reach, draws)
    colors = palette(draws, contrast=THING_CONTRAST, without=[stuff.palette.main for stuff in composition.stuffs])

    under = composition.layer[rows, columns]
    seen = inside & (under < MOST_STUFFS)
    left = [room[layer] - int(np.count_nonzero(seen & (under == layer))) for layer in range(len(room))]
    if (
        np.count_nonzero(seen) < LEAST_SEEN * np.count_nonzero(inside)
        or min(left) < LEAST_STUFF * composition.layer.size
    ):
        return
    room[:] = left
    np.copyto(under, np.uint8(MOST_STUFFS + MOST_THINGS - 1 - len(composition.things)), where=seen)
    np.copyto(composition.tone[rows, columns], ((TONES - 0.5) * tone).astype(np.uint8), where=seen)
    composition.things.append(PlacedThing(name, colors, x, y, radius))


def _free_place(things: list[PlacedThing], reach: float, draws: Draws) -> tuple[float, float]:
    """Draws three random centres and returns the one with the largest gap to the things already placed.

    The picture's edges may cut a thing a little.
    """
    margin = 0.8 * reach
    places = [(draws.uniform(margin, SIDE - margin), draws.uniform(margin, SIDE - margin)) for _ in range(3)]
    gap = lambda place: min(
        (math.hypot(place[0] - t.x, place[1] - t.y) - reach - t.radius * DRAWN[t.name].stretch for t in things),
        default=0.0,
    )
    return max(places, key=gap)


def picture(composition: Composition) -> UInt8[np.ndarray, "size size 3"]:
    """Draws the picture: tones become colours, and each pixel is the mean of its samples."""
    table = np.zeros((MOST_STUFFS + MOST_THINGS, TONES), np.uint32)
    for layer, content in composition.by_layer().items():
        red, green, blue = content.palette.colors.astype(np.uint32).T
        # Ten bits per channel hold the sum of four samples, so one addition adds all three channels.
        table[layer] = (red << 20) | (green << 10) | blue
    packed = table.ravel().take(composition.layer.astype(np.uint16) * TONES + composition.tone)
    total = packed[0::2, 0::2] + packed[0::2, 1::2] + packed[1::2, 0::2] + packed[1::2, 1::2]
    channels = [((total >> shift & 1023) + 2) >> 2 for shift in (20, 10, 0)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def label_map(composition: Composition, classes: tuple[str, ...]) -> UInt8[np.ndarray, "size size"]:
    """Returns for each pixel the index in `classes` of the layer of most of its samples; of equals, the front layer."""
    layer = composition.layer
    a, b = np.minimum(layer[0::2, 0::2], layer[0::2, 1::2]), np.maximum(layer[0::2, 0::2], layer[0::2, 1::2])
    c, d = np.minimum(layer[1::2, 0::2], layer[1::2, 1::2]), np.maximum(layer[1::2, 0::2], layer[1::2, 1::2])
    first, last = np.minimum(a, c), np.maximum(b, d)
    e, f = np.maximum(a, c), np.minimum(b, d)
    second, third = np.minimum(e, f), np.maximum(e, f)
    # The samples are sorted, so equal ones are neighbours: the last two win if equal, else the middle two, else the
    # first two.
    most = np.where(second == third, second, np.where(first == second, first, last))
    most = np.where(third == last, last, most)
    table = np.zeros(MOST_STUFFS + MOST_THINGS, np.uint8)
    for number, content in composition.by_layer().items():
        table[number] = classes.index(content.name)
    return table[most]
