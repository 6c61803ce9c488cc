"""Draw how mean IoU came with training, by block, from the logs of one or more runs of flow matching.

    python benchmarks/learning_curves.py RUN[,RUN GOING ON FROM IT...] ... --out curves.svg

Each argument is one panel: runs of `train.py` in the order in which one went on from the other, their steps counted on.
The block that is best at the end has its own colour. Prints the figures that it draws.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

from markupsafe import Markup

from seg4diff_jax.reporting.svg_plots import HEIGHT, WIDTH, Series, line_plot

STYLE = """
svg { background: #fff; font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #59626d }
.grid { stroke: #e1e5ea }
g { stroke: #aeb8c4; stroke-width: 2; fill: #aeb8c4 }
polyline { fill: none }
.title { font-size: 14px; fill: #1b2026 }
"""
BEST = "#2b6cb0"
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


def panel(title: str, steps: list[int], blocks: list[list[float]]) -> Markup:
    best = max(range(len(blocks)), key=lambda block: (not math.isnan(blocks[block][-1]), blocks[block][-1]))
    lines = [Series([None if math.isnan(value) else (value, 0.0) for value in values]) for values in blocks]
    drawn = line_plot(title, steps, lines, horizontal="steps", vertical="mean IoU, %")
    colored = drawn.replace(f'<g class="series{best}">', Markup('<g style="stroke:{0};fill:{0}">').format(BEST))
    placed = colored.replace("<svg ", Markup('<svg y="{}" width="{}" height="{}" ').format(HEAD, WIDTH, HEIGHT), 1)
    heading = Markup('<text class="title" x="46" y="20">{}; <tspan fill="{}">block {}: {:.1f}</tspan></text>')
    return heading.format(title, BEST, best, blocks[best][-1]) + placed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("panels", nargs="+", metavar="RUN[,RUN...]", help="directories that train.py has written")
    parser.add_argument("--titles", help="of the panels, with commas between; default: their last directory's names")
    parser.add_argument("--sigma", default="0.3", help="noise level at which masks were read")
    parser.add_argument("--out", type=Path, default=Path("curves.svg"))
    options = parser.parse_args()
    paths = [[Path(run) for run in one.split(",")] for one in options.panels]
    titles = options.titles.split(",") if options.titles else [runs[-1].name for runs in paths]
    drawn = []
    for number, (title, runs) in enumerate(zip(titles, paths, strict=True)):
        steps, blocks = curves(runs, options.sigma)
        print(title)
        for step, values in zip(steps, zip(*blocks, strict=True), strict=True):
            print(f"{step:>7}  " + "  ".join(f"{value:5.1f}" for value in values))
        drawn.append(
            Markup('<svg x="{}" width="{}" height="{}">{}</svg>').format(
                number * WIDTH, WIDTH, HEIGHT + HEAD, panel(title, steps, blocks)
            )
        )
    whole = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}"><style>{}</style>{}</svg>\n').format(
        len(drawn) * WIDTH, HEIGHT + HEAD, Markup(STYLE), Markup("").join(drawn)
    )
    options.out.write_text(whole)


if __name__ == "__main__":
    main()
