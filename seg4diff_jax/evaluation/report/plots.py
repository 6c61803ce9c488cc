"""Plots of an evaluation: mean IoU by block, by noise level, by head, and by two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from seg4diff_jax.reporting.svg_plots import Series, heat_plot, line_plot

FEW = 6
"""Columns of a heat map beside which there is room for another plot."""
Score = tuple[float, float] | None
Scores = Mapping[tuple[int, int], Score]
LEVELS = "noise level, of 28 from the clean end"


@dataclass(frozen=True)
class Sweep:
    """Blocks, noise levels and heads of one way of asking, which `title` names.

    Attributes:
      scores: mean IoU in percent and its spread, by block and noise level, of the head `read`; None is their mean.
      heads: the same by block and single head, at the best noise level.
      best: block and noise level of the highest; `head` is None where that is the mean of the heads.
    """

    title: str
    scores: Scores
    heads: Scores
    best: tuple[int, int]
    head: int | None = None
    read: int | None = None


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
    heads = sorted({head for sweep in sweeps for _, head in sweep.heads})
    single = [f"head {sweep.read}" for sweep in sweeps if sweep.read is not None]
    of = f", of {_each(single)}" if single else ""
    block, level = _each(sweep.best[0] for sweep in sweeps), _each(sweep.best[1] for sweep in sweeps)
    found: list[Plot] = []
    if len(blocks) > 1:
        lines = [_series(blocks, lambda at, one=one: one.scores.get((at, one.best[1])), one.best[0]) for one in sweeps]
        found.append(_lines(f"by block, at noise level {level}{of}", "block", blocks, lines, sweeps, guess))
    if len(steps) > 1:
        lines = [_series(steps, lambda at, one=one: one.scores.get((one.best[0], at)), one.best[1]) for one in sweeps]
        found.append(_lines(f"by noise level, at block {block}{of}", LEVELS, steps, lines, sweeps, guess))
    if len(heads) > 1:
        lines = [_series(heads, lambda at, one=one: one.heads.get((one.best[0], at)), one.head) for one in sweeps]
        found.append(_lines(f"by head, at block {block} and noise level {level}", "head", heads, lines, sweeps, guess))
    for one in sweeps:
        where = "" if len(sweeps) == 1 else f", {one.title}"
        if len(blocks) > 1 and len(steps) > 1:
            found.append(_heat(where, "noise level", one.scores, one.best))
        if len(blocks) > 1 and len(heads) > 1:
            found.append(_heat(where, "head", one.heads, None if one.head is None else (one.best[0], one.head)))
    return found


def _series(places: Sequence[int], score: Callable[[int], Score], best: int | None) -> Series:
    """A score at each place; that of `best` stands out."""
    return Series([score(place) for place in places], None if best is None else places.index(best))


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


def _heat(where: str, axis: str, scores: Scores, best: tuple[int, int] | None) -> Plot:
    """Mean IoU by block and another `axis`; the cell of `best` is framed."""
    blocks, places = sorted({block for block, _ in scores}), sorted({place for _, place in scores})
    table = [[scores.get((block, place)) for place in places] for block in blocks]
    values = np.array([[cell[0] if cell else np.nan for cell in line] for line in table])
    mark = (blocks.index(best[0]), places.index(best[1])) if best else None
    caption = f"by block and {axis}{where}"
    drawn = heat_plot(f"mean IoU {caption}", values, blocks, places, vertical="block", horizontal=axis, mark=mark)
    return Plot("heat wide" if len(places) > FEW else "heat", caption, drawn)


def _each(values: Iterable[int | str]) -> str:
    return " and ".join(map(str, dict.fromkeys(values)))
