"""Draws small plots by matplotlib, as SVG for a page. Text stays text, and equal numbers give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.transforms import IdentityTransform

from seg4diff_jax.reporting.colors import PAGE_COLORS, hexadecimal, ink_on, tint

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 22, 44
"""Space around the axes of a line plot. All lengths here are CSS pixels. matplotlib calls them points."""
ASIDE = 14
"""Space between the sides of the axes and the first and last point."""
DIGIT = 8
"""Largest width of a digit in the labels of an axis."""
MOST_LABELLED = 12
"""Most points of a single line whose values are written beside them."""
WIDE, WIDEST, ROW, HEAD = 1100, 72, 26, 54
"""Sizes of a heat map: largest width, largest width of a column, height of a row, space for row and column labels."""
POINTS_PER_INCH = 72
FONT = "DejaVu Sans"
"""The font with which matplotlib measures text; it comes with matplotlib. The page shows text in its own font."""

FAINT, LINE, INK, DULL = (PAGE_COLORS[name] for name in ("faint", "line", "ink", "dull"))
PAPER, BEST, SECOND, THIRD = (PAGE_COLORS[name] for name in ("paper", "best", "second", "third"))
LINE_COLORS = (BEST, SECOND, THIRD)
CLASSES = ("line", "point", "value", "cell", "frame")
"""Classes of the parts of a drawing, for style sheets."""
drawing = style.context(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "seg4diff_jax",
        "text.parse_math": False,
        "font.family": FONT,
        "font.size": 12,
        "axes.labelsize": 12,
        "axes.titlesize": 14,
        "axes.labelcolor": FAINT,
        "axes.titlecolor": INK,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "grid.color": LINE,
        "grid.linewidth": 1,
        "lines.scale_dashes": False,
        "lines.solid_capstyle": "butt",
        **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
        **{f"{axis}tick.{name}": value for axis in "xy" for name, value in (("color", FAINT), ("major.size", 0))},
        **{f"{axis}tick.labelsize": 12 for axis in "xy"},
    },
    after_reset=True,
)
"""A decorator for functions that draw. It sets the look of plots, whatever the user's own matplotlib settings are."""


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
      values: value and spread at each place on the axis; None: no point is drawn there.
      mark: index of the point that is emphasised.
    """

    values: Sequence[tuple[float, float] | None]
    mark: int | None = None


@drawing
def line_plot(
    title: str,
    places: Sequence[int],
    series: Sequence[Series],
    *,
    horizontal: str,
    vertical: str,
    level: float | None = None,
    bottom: int = 0,
) -> Markup:
    """Draws lines over whole numbers. Values are in percent, or cosines times 100.

    Args:
      title: description of the plot for people who cannot see it.
      places: the whole numbers on the horizontal axis.
      horizontal, vertical: labels of the axes.
      level: height of a dashed horizontal line.
      bottom: where the vertical axis begins, a multiple of 10.
    """
    figure = Figure(figsize=(WIDTH / POINTS_PER_INCH, HEIGHT / POINTS_PER_INCH), dpi=POINTS_PER_INCH, frameon=False)
    axes = line_axes(figure)
    draw_lines(axes, places, series, horizontal=horizontal, vertical=vertical, level=level, bottom=bottom)
    return to_markup(figure, title)


def line_axes(figure: Figure, left: int = 0) -> Axes:
    """Makes the axes of a line plot at the bottom of a figure, `left` pixels from its left side."""
    width, height = figure.bbox.size
    inside = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return figure.add_axes(((left + LEFT) / width, BOTTOM / height, inside[0] / width, inside[1] / height))


def draw_lines(
    axes: Axes,
    places: Sequence[int],
    series: Sequence[Series],
    *,
    horizontal: str,
    vertical: str,
    level: float | None = None,
    bottom: int = 0,
    colors: Sequence[str] = LINE_COLORS,
) -> None:
    """Draws lines on axes of `line_axes`. Arguments are those of `line_plot`; colours repeat if lines are more."""
    known = [value[0] + value[1] for one in series for value in one.values if value] + ([level] if level else [])
    top = min(100, 10 * int(np.ceil(max(known, default=0) / 10 + 0.3)))
    limits = bottom, max(top, bottom + 1)
    width = WIDTH - LEFT - RIGHT - 2 * ASIDE
    scale = width / (max(places) - min(places) or 1)
    axes.set(xlim=(min(places) - ASIDE / scale, min(places) + (width + ASIDE) / scale), ylim=limits)
    axes.set_yticks(range(bottom, top + 1, 10 if top - bottom <= 60 else 20))
    axes.set_xticks(_apart(places, DIGIT * (len(str(places[-1])) + 1) / scale))
    axes.tick_params(pad=7)
    axes.grid(axis="y", clip_on=False)
    axes.set_xlabel(horizontal, verticalalignment="baseline")
    axes.set_ylabel(vertical, verticalalignment="baseline", rotation_mode="anchor")
    axes.xaxis.set_label_coords(0.5, (6 - BOTTOM) / axes.bbox.height)
    axes.yaxis.set_label_coords((11 - LEFT) / axes.bbox.width, 0.5)
    if level is not None:
        axes.axhline(level, color=DULL, linewidth=1.5, linestyle=(0, (5, 4)), clip_on=False)
    for number, one in enumerate(series):
        _draw_line(axes, one, places, colors[number % len(colors)], limits, alone=len(series) == 1)


def _apart(places: Sequence[int], room: float) -> Sequence[int]:
    """Returns every place, every second, or every third and so on: the most places that are `room` apart."""
    chosen = (places[::every] for every in range(1, len(places) + 1))
    return next(some for some in chosen if all(after - before >= room for before, after in pairwise(some)))


def _draw_line(
    axes: Axes, one: Series, places: Sequence[int], color: str, limits: tuple[int, int], *, alone: bool
) -> None:
    labelled = alone and len(places) <= MOST_LABELLED
    known = [
        (index, place, *value) for index, (place, value) in enumerate(zip(places, one.values, strict=True)) if value
    ]
    height = lambda value: min(max(value, limits[0]), limits[1])
    heights = [height(mean) for _, _, mean, _ in known]
    axes.plot([place for _, place, _, _ in known], heights, color=color, linewidth=2, clip_on=False, gid="line")
    for index, place, mean, spread in known:
        marked = index == one.mark
        if spread:
            ends = height(mean - spread), height(mean + spread)
            axes.plot((place, place), ends, color=color, linewidth=1.2, alpha=0.7, clip_on=False)
        x, y = axes.transData.transform((place, height(mean))).tolist()
        point = Circle((x, y), 6.5 if marked else 4, color=color, linewidth=0, transform=IdentityTransform())
        point.set(clip_on=False, zorder=3, gid=f"point {place}: {mean:.1f}")
        axes.add_artist(point)
        if labelled or (marked and alone):
            axes.annotate(
                f"{mean:.1f}",
                (place, height(mean + spread)),
                xytext=(0, 9),
                textcoords="offset points",
                annotation_clip=False,
                horizontalalignment="center",
                verticalalignment="baseline",
                color=color if marked else INK,
                fontsize=13 if marked else 11.5,
                fontweight="bold" if marked else "normal",
                gid="value",
            )


@drawing
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
    """Draws numbers in cells. A cell with a larger number is darker, and there is no cell for NaN.

    Args:
      title: description of the plot for people who cannot see it.
      rows, columns: labels of the rows and columns.
      mark: row and column, as indices, of the cell with a frame.
    """
    cell = min(WIDEST, (WIDE - HEAD) / len(columns))
    inside = cell * len(columns), ROW * len(rows)
    width, height = HEAD + inside[0] + 3, HEAD + inside[1] + 3
    figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH), dpi=POINTS_PER_INCH, frameon=False)
    axes = figure.add_axes((HEAD / width, 3 / height, inside[0] / width, inside[1] / height))
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), map(str, columns))
    axes.set_yticks(range(len(rows)), map(str, rows))
    axes.xaxis.tick_top()
    axes.tick_params("x", pad=6)
    axes.tick_params("y", pad=9)
    axes.set_xlabel(horizontal, verticalalignment="baseline")
    axes.set_ylabel(vertical, verticalalignment="baseline", rotation_mode="anchor")
    axes.xaxis.set_label_coords(0.5, 1 + (HEAD - 13) / inside[1])
    axes.yaxis.set_label_coords((13 - HEAD) / inside[0], 0.5)
    found = values[np.isfinite(values)]
    least, greatest = (float(found.min()), float(found.max())) if found.size else (0.0, 1.0)
    for (line, at), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = tint((value - least) / max(greatest - least, 1e-9))
            box = Rectangle((at - 0.5, line - 0.5), 1, 1, facecolor=hexadecimal(color), edgecolor=PAPER, linewidth=2)
            axes.add_patch(box).set(clip_on=False, gid="cell")
            written = f"{value:.{1 if cell >= 36 else 0}f}"
            how = {"horizontalalignment": "center", "verticalalignment": "center_baseline", "fontsize": 11.5}
            axes.text(at, line, written, color=hexadecimal(ink_on(color)), **how)
    if mark:
        frame = Rectangle((mark[1] - 0.5, mark[0] - 0.5), 1, 1, fill=False, edgecolor=SECOND, linewidth=2.5)
        axes.add_patch(frame).set(clip_on=False, gid="frame")
    return to_markup(figure, title)


def to_markup(figure: Figure, title: str) -> Markup:
    """Returns a figure as an SVG element of a page. Call this only from functions that `drawing` decorates.

    A page may hold several figures and needs no other file for them. matplotlib's metadata is removed. The ids of parts
    become classes, since several parts may have the same name. The text after the name in an id becomes a tooltip.
    """
    written = BytesIO()
    figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(written.getvalue())
    for head in root.findall("{*}defs"):  # it has a style sheet, which would apply to the whole page
        root.remove(head)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if element.tag == "text":
            element.attrib["style"] = element.attrib["style"].replace(f"font-family: '{FONT}'; ", "")
        name, _, hint = element.attrib.pop("id", "").partition(" ")
        if name in CLASSES:
            element.set("class", name)
        if hint:
            ElementTree.SubElement(element, "title").text = hint
    root.attrib = {
        "class": "plot",
        "viewBox": root.attrib["viewBox"],
        "style": f"max-width:{figure.bbox.width:.0f}px",
        "role": "img",
        "aria-label": title,
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))
