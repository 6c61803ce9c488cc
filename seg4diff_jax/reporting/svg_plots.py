"""Small plots as SVG, to be put into a page: how they look, but for their shapes, is the page's style sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from seg4diff_jax.reporting.colors import hexadecimal, ink_on, tint

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 22, 44
"""Space around the axes of a line plot."""
DIGIT = 8
"""Width of a digit beside an axis, at most."""
MOST_LABELLED = 12
"""Points whose values are written beside them, of a line that is alone."""
WIDE, WIDEST, ROW, HEAD = 1100, 72, 26, 54
"""Of a heat map: greatest width, of a column too, height of a row, space for the names of rows and columns."""

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """A line: its values with their spread, one for each place on the axis; nothing is drawn for None.

    Attributes:
      mark: place of the point that stands out.
    """

    values: Sequence[tuple[float, float] | None]
    mark: int | None = None


def line_plot(
    title: str,
    places: Sequence[int],
    series: Sequence[Series],
    *,
    horizontal: str,
    vertical: str,
    level: float | None = None,
) -> Markup:
    """Lines over whole numbers, from 0 upwards, in percent.

    Args:
      title: for those who cannot see it.
      level: how high a dashed horizontal line is.
    """
    known = [value[0] + value[1] for one in series for value in one.values if value] + ([level] if level else [])
    top = min(100, 10 * int(np.ceil(max(known, default=0) / 10 + 0.3)))
    span = max(places) - min(places) or 1
    x = lambda place: LEFT + 14 + (WIDTH - LEFT - RIGHT - 28) * (place - min(places)) / span
    y = lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(value, 0), top) / max(top, 1)
    parts = [_axes(places, top, x, y, horizontal, vertical)]
    if level is not None:
        parts.append(
            Markup('<line class="level" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                LEFT, WIDTH - RIGHT, y(level), y(level)
            )
        )
    alone = len(series) == 1
    parts += [_line(one, number, places, x, y, alone=alone) for number, one in enumerate(series)]
    return _svg(title, WIDTH, HEIGHT, parts)


def _axes(places: Sequence[int], top: int, x: Scale, y: Scale, horizontal: str, vertical: str) -> Markup:
    parts = []
    for value in range(0, top + 1, 10 if top <= 60 else 20):
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                LEFT, WIDTH - RIGHT, y(value), y(value)
            )
        )
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                LEFT - 7, y(value) + 4, value
            )
        )
    room = DIGIT * (len(str(places[-1])) + 1)
    apart = lambda some: all(x(after) - x(before) >= room for before, after in pairwise(some))
    every = next(every for every in range(1, len(places) + 1) if apart(places[::every]))
    for place in places[::every]:
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x(place), HEIGHT - BOTTOM + 17, place
            )
        )
    parts.append(
        Markup(
            '<text class="axis" x="{:.1f}" y="{}" text-anchor="middle">{}</text>'
            '<text class="axis" transform="translate(11 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>'
        ).format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, horizontal, (TOP + HEIGHT - BOTTOM) / 2, vertical)
    )
    return Markup("").join(parts)


def _line(one: Series, number: int, places: Sequence[int], x: Scale, y: Scale, *, alone: bool) -> Markup:
    labelled = alone and len(places) <= MOST_LABELLED
    known = [
        (index, place, *value) for index, (place, value) in enumerate(zip(places, one.values, strict=True)) if value
    ]
    points = " ".join(f"{x(place):.1f},{y(mean):.1f}" for _, place, mean, _ in known)
    parts = [Markup('<polyline points="{}"/>').format(points)]
    for index, place, mean, spread in known:
        if spread:
            parts.append(
                Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>').format(
                    x(place), y(mean - spread), y(mean + spread)
                )
            )
        marked = index == one.mark
        parts.append(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}: {:.1f}</title></circle>').format(
                x(place), y(mean), 5.5 if marked else 3, place, mean
            )
        )
        if labelled or (marked and alone):
            parts.append(
                Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="middle">{:.1f}</text>').format(
                    "value marked" if marked else "value", x(place), y(mean + spread) - 9, mean
                )
            )
    return Markup('<g class="series{}">{}</g>').format(number, Markup("").join(parts))


def heat_plot(
    title: str,
    values: Float[np.ndarray, "rows columns"],
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    vertical: str,
    horizontal: str,
    mark: tuple[int, int] | None = None,
) -> Markup:
    """Numbers in cells that are the darker the greater the number is; nothing where it is NaN.

    Args:
      mark: row and column of the cell that is framed.
    """
    cell = min(WIDEST, (WIDE - HEAD) / len(columns))
    digits = 1 if cell >= 36 else 0
    width, height = HEAD + cell * len(columns) + 3, HEAD + ROW * len(rows) + 3
    least, greatest = (float(np.nanmin(values)), float(np.nanmax(values))) if np.isfinite(values).any() else (0.0, 1.0)
    parts = [
        Markup('<text class="axis" x="{:.1f}" y="13" text-anchor="middle">{}</text>').format(
            HEAD + cell * len(columns) / 2, horizontal
        ),
        Markup('<text class="axis" transform="translate(13 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>').format(
            HEAD + ROW * len(rows) / 2, vertical
        ),
    ]
    for at, name in enumerate(columns):
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                HEAD + cell * (at + 0.5), HEAD - 9, name
            )
        )
    for line, name in enumerate(rows):
        y = HEAD + ROW * line
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(HEAD - 9, y + 17, name)
        )
        for at, value in enumerate(values[line].tolist()):
            if np.isnan(value):
                continue
            color = tint((value - least) / max(greatest - least, 1e-9))
            parts.append(
                Markup(
                    '<rect x="{0:.1f}" y="{1}" width="{2:.1f}" height="{3}" fill="{4}"/>'
                    '<text class="cell" x="{5:.1f}" y="{6}" text-anchor="middle" style="fill:{7}">{8:.{9}f}</text>'
                ).format(
                    HEAD + cell * at + 1,
                    y + 1,
                    cell - 2,
                    ROW - 2,
                    hexadecimal(color),
                    HEAD + cell * (at + 0.5),
                    y + 17,
                    hexadecimal(ink_on(color)),
                    value,
                    digits,
                )
            )
    if mark:
        parts.append(
            Markup('<rect class="frame" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>').format(
                HEAD + cell * mark[1], HEAD + ROW * mark[0], cell, ROW
            )
        )
    return _svg(title, width, height, parts)


def _svg(title: str, width: int | float, height: int | float, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="plot" viewBox="0 0 {0:.0f} {1:.0f}" style="max-width:{0:.0f}px" role="img" aria-label="{2}">{3}'
        "</svg>"
    ).format(width, height, title, Markup("").join(parts))
