"""Plots of an evaluation: mean IoU by block, by noise level, and by both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from seg4diff_jax.reporting.svg_plots import Series, heat_plot, line_plot

FEW = 6
"""Columns of a heat map beside which there is room for another plot."""
LEVELS = "noise level, of 28 from the clean end"


@dataclass(frozen=True)
class Sweep:
    """Blocks and noise levels of one way of asking, which `title` names.

    Attributes:
      scores: mean IoU in percent and its spread, by block and noise level.
      best: block and noise level of the highest.
    """

    title: str
    scores: Mapping[tuple[int, int], tuple[float, float] | None]
    best: tuple[int, int]


@dataclass(frozen=True)
class Plot:
    """A drawing. `legend`: what its lines are, each with the class that gives it its colour."""

    kind: str
    caption: str
    drawing: Markup
    legend: Sequence[tuple[str, str]] = ()


def plots(sweeps: Sequence[Sweep], guess: tuple[str, float] | None) -> list[Plot]:
    """Those for which there is more than one place on an axis.

    Args:
      guess: what guessing scores at best, and its name: shown where it is not unclear which way of asking it is for.
    """
    blocks = sorted({block for sweep in sweeps for block, _ in sweep.scores})
    steps = sorted({step for sweep in sweeps for _, step in sweep.scores})
    found: list[Plot] = []
    if len(blocks) > 1:
        at = _each(sweep.best[1] for sweep in sweeps)
        lines = [
            Series([one.scores.get((block, one.best[1])) for block in blocks], blocks.index(one.best[0]))
            for one in sweeps
        ]
        found.append(_lines(f"by block, at noise level {at}", "block", blocks, lines, sweeps, guess))
    if len(steps) > 1:
        at = _each(sweep.best[0] for sweep in sweeps)
        lines = [
            Series([one.scores.get((one.best[0], step)) for step in steps], steps.index(one.best[1])) for one in sweeps
        ]
        found.append(_lines(f"by noise level, at block {at}", LEVELS, steps, lines, sweeps, guess))
    if len(blocks) > 1 and len(steps) > 1:
        found += [_heat(one, blocks, steps, alone=len(sweeps) == 1) for one in sweeps]
    return found


def _lines(
    caption: str,
    axis: str,
    places: Sequence[int],
    lines: Sequence[Series],
    sweeps: Sequence[Sweep],
    guess: tuple[str, float] | None,
) -> Plot:
    legend = []
    if len(sweeps) > 1:
        guess = None
        for number, sweep in enumerate(sweeps):
            top = sweep.scores.get(sweep.best)
            legend.append((f"series{number}", sweep.title + (f": {top[0]:.1f}" if top else "")))
    elif guess:
        legend.append(("level", f"{guess[0]}: {guess[1]:.1f}"))
    level = guess and guess[1]
    drawn = line_plot(f"mean IoU {caption}", places, lines, horizontal=axis, vertical="mean IoU, %", level=level)
    return Plot("line", caption, drawn, legend)


def _heat(one: Sweep, blocks: Sequence[int], steps: Sequence[int], *, alone: bool) -> Plot:
    table = [[one.scores.get((block, step)) for step in steps] for block in blocks]
    values = np.array([[cell[0] if cell else np.nan for cell in line] for line in table])
    mark = blocks.index(one.best[0]), steps.index(one.best[1])
    caption = "by block and noise level" + ("" if alone else f", {one.title}")
    drawn = heat_plot(
        f"mean IoU {caption}", values, blocks, steps, vertical="block", horizontal="noise level", mark=mark
    )
    return Plot("heat wide" if len(steps) > FEW else "heat", caption, drawn)


def _each(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, dict.fromkeys(numbers)))
