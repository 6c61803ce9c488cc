"""Draws mean IoU over training steps, by block, from the logs of one or more runs of flow matching.

    python benchmarks/learning_curves.py RUN[,RUN GOING ON FROM IT...] ... --out curves.svg

Each argument is one panel: runs of `train.py`, each of which continued the one before; their steps are added up. The
block that is best at the end has its own colour. Prints the values that it draws.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from seg4diff_jax.reporting.svg_plots import (
    BEST,
    DULL,
    HEIGHT,
    POINTS_PER_INCH,
    WIDTH,
    Series,
    draw_lines,
    drawing,
    line_axes,
    to_markup,
)

FAMILY = "system-ui, Segoe UI, Roboto, DejaVu Sans, sans-serif"
HEAD = 30
"""Height of a panel's title."""


def curves(runs: list[Path], sigma: str) -> tuple[list[int], list[list[float]]]:
    """Steps, and for each block its mean IoU in percent at them, at one noise level; NaN where it was no number."""
    steps: list[int] = []
    rows: list[list[float]] = []
    before = 0
    for run in runs:
        evaluated = [line for line in map(json.loads, (run / "metrics.jsonl").open()) if "validation/miou" in line]
        for line in evaluated:
            matches = (re.fullmatch(rf"validation/miou/(\d+)@{re.escape(sigma)}", name) for name in line)
            found = {int(match[1]): line[match[0]] for match in matches if match}
            if not found:
                raise SystemExit(f"{run / 'metrics.jsonl'} has no mean IoU at noise level {sigma}")
            steps.append(before + int(line["step"]))
            rows.append([math.nan if found[block] is None else found[block] for block in sorted(found)])
        before = steps[-1]
    return steps, [list(values) for values in zip(*rows, strict=True)]


@drawing
def drawn(titles: list[str], panels: list[tuple[list[int], list[list[float]]]]) -> str:
    """Panels side by side, each under its title and its best block."""
    size = len(panels) * WIDTH / POINTS_PER_INCH, (HEIGHT + HEAD) / POINTS_PER_INCH
    figure = Figure(figsize=size, dpi=POINTS_PER_INCH, facecolor="white")
    for number, (title, (steps, blocks)) in enumerate(zip(titles, panels, strict=True)):
        best = max(range(len(blocks)), key=lambda block: (not math.isnan(blocks[block][-1]), blocks[block][-1]))
        lines = [Series([None if math.isnan(value) else (value, 0.0) for value in values]) for values in blocks]
        colors = [BEST if block == best else DULL for block in range(len(blocks))]
        axes = line_axes(figure, number * WIDTH)
        draw_lines(axes, steps, lines, horizontal="steps", vertical="mean IoU, %", colors=colors)
        axes.set_title(title, loc="left", pad=HEAD)
        axes.set_title(f"block {best}: {blocks[best][-1]:.1f}", loc="right", pad=HEAD, color=BEST)
    root = Markup('<svg xmlns="http://www.w3.org/2000/svg" font-family="{}" ').format(FAMILY)
    return to_markup(figure, "; ".join(titles)).replace("<svg ", root, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("panels", nargs="+", metavar="RUN[,RUN...]", help="directories that train.py has written")
    parser.add_argument("--titles", help="of the panels, with commas between; default: their last directory's names")
    parser.add_argument("--sigma", default="0.3", help="noise level at which masks were read")
    parser.add_argument("--out", type=Path, default=Path("curves.svg"))
    options = parser.parse_args()
    paths = [[Path(run) for run in one.split(",")] for one in options.panels]
    titles = options.titles.split(",") if options.titles else [runs[-1].name for runs in paths]
    panels = [curves(runs, options.sigma) for runs in paths]
    for title, (steps, blocks) in zip(titles, panels, strict=True):
        print(title)
        for step, values in zip(steps, zip(*blocks, strict=True), strict=True):
            print(f"{step:>7}  " + "  ".join(f"{value:5.1f}" for value in values))
    options.out.write_text(drawn(titles, panels) + "\n")


if __name__ == "__main__":
    main()
