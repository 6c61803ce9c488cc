"""What an evaluation leaves behind: results.json, per_class.csv, confusion.csv, a page, and a table on the terminal."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jaxtyping import Integer
from rich.console import Console
from rich.table import Table

from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.both_ways import COLUMNS, both_ways
from seg4diff_jax.evaluation.options import ASKED
from seg4diff_jax.evaluation.presence_lines import FIGURES, presence_lines
from seg4diff_jax.evaluation.report.page import number, write_page
from seg4diff_jax.evaluation.rows import BASELINES, Row, best_setting, by_setting, guesses, mean_figures
from seg4diff_jax.evaluation.run import Evaluation
from seg4diff_jax.versions import versions

RESULTS, CONFIG, CLASSES, CONFUSION = "results.json", "config.yaml", "per_class.csv", "confusion.csv"
SCORES = {
    "miou": "mIoU",
    "mean_accuracy": "mACC",
    "pixel_accuracy": "pixel acc.",
    "things": "things",
    "stuffs": "stuffs",
    "boundary_iou": "boundary IoU",
    "pointing": "pointing",
    "average_precision": "mAP",
    "segments": "segments",
}
"""Percentages; last, of segments without names, how many an image has."""
PLACE = ("dataset", "protocol", "prompts", "threshold", "block", "head", "refined", "step", "seed", "images", "skipped")
MOST_NAMED = 5
"""Left-out images that are named on the terminal; `results.json` has all."""


def write(
    out: Path, evaluation: Evaluation, benchmark: Benchmark, config: dict[str, Any], seconds: Mapping[str, float]
) -> None:
    """Write config.yaml, the page, per_class.csv, confusion.csv, and results.json: figures in percent, and how they
    were made.

    The last is written last: a directory that has it is complete.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).unlink(missing_ok=True)
    (out / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    made: dict[str, Any] = {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "device": device(),
        "versions": versions(),
    }
    write_page(out, evaluation, benchmark, config, made)
    write_classes(out / CLASSES, evaluation.rows)
    (out / CONFUSION).unlink(missing_ok=True)  # of an earlier run
    if evaluation.confusion is not None:
        write_confusion(out / CONFUSION, evaluation.confusion, benchmark.classes)
    contents = {
        "rows": [row.plain() for row in evaluation.rows],
        "baselines": [row.plain() for row in evaluation.baselines],
        "best": {
            name: value for name, value in evaluation.best._asdict().items() if value is not None and value is not False
        },
        "units": "percent",
        "skipped": evaluation.skipped,
        "unlabelled": evaluation.unlabelled,
        "config": config,
        **made,
    }
    (out / RESULTS).write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def device() -> dict[str, Any]:
    """What it was measured on: the kind of device, how many over all processes, and how many processes."""
    return {"kind": jax.devices()[0].device_kind, "devices": jax.device_count(), "processes": jax.process_count()}


def write_classes(path: Path, rows: list[Row]) -> None:
    """One line for each class of each row; nothing where a class does not occur."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow([*PLACE, "class", "iou", "accuracy"])
        for row in rows:
            plain, metrics = row.plain(), row.metrics
            place = [plain.get(name) for name in PLACE]
            lines.writerows([*place, name, iou, metrics.accuracy[name]] for name, iou in metrics.iou.items())


def write_confusion(path: Path, confusion: Integer[np.ndarray, "classes classes"], classes: Sequence[str]) -> None:
    """As a table: a line for each class of the labels, a column for each class that its pixels are taken for."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["", *classes])
        lines.writerows([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))


def tell(console: Console, evaluation: Evaluation) -> None:
    """The table of scores on stdout, and on stderr what was left out."""
    rows = evaluation.rows
    shown = [name for name in SCORES if any(row.figures.get(name) is not None for row in rows)]
    images, seeds = rows[0].images, len({row.seed for row in rows})
    over = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    table = Table(title=f"{images.dataset}, {images.images} images, %{over}", title_justify="left", title_style="bold")
    table.add_column("")
    for name in shown:
        table.add_column(SCORES[name], justify="right")
    cells = lambda some: [number(mean_figures(some, shown)[name]) for name in shown]
    kinds = list(dict.fromkeys(row.prompts for row in rows))
    for kind in kinds:
        own = [row for row in rows if row.prompts == kind]
        asked = f", {ASKED[kind]}" if len(kinds) > 1 or kind != "present" else ""
        for setting, some in by_setting(own).items():
            best = "bold" if setting == evaluation.best else ""
            table.add_row(f"{setting.title}{asked}", *cells(some), style=best)
            for figure in some[0].reported:
                said = f"{figure.title}, as reported"
                table.add_row(said, f"{figure.miou:.1f}", *[""] * (len(shown) - 1))
        table.add_section()
        for name, some in guesses(evaluation.baselines, best_setting(own)).items():
            table.add_row(f"{BASELINES[name]}{asked}", *cells(some), style="dim")
        table.add_section()
    out = Console(highlight=False)
    out.print(table)
    if lines := both_ways(rows, evaluation.baselines):
        beside = Table(title="mIoU, %, both ways of asking", title_justify="left", title_style="bold")
        beside.add_column("")
        for title in COLUMNS.values():
            beside.add_column(title, justify="right")
        for line in lines:
            title = f"{line.title}, {line.source}" if line.source else line.title
            cells = [number(line.miou[kind]) for kind in COLUMNS]
            beside.add_row(title, *cells, style="dim" if line.guess else "")
        out.print(beside)
    tell_presence(out, rows)
    if images.cut_off:
        share = 100 * images.cut_off / (images.cut_off + images.pixels)
        console.print(f"cut off, without a prediction and not scored: {images.cut_off} pixels, {share:.1f} %")
    for names, what in ((evaluation.skipped, "skipped"), (evaluation.unlabelled, "without a labelled pixel")):
        if names:
            listing = "".join(f"\n  {name}" for name in names[:MOST_NAMED])
            counted = f"{len(names)} image{'s' * (len(names) != 1)}"
            console.print(f"{counted} {what}:{listing}" + "\n  ..." * (len(names) > MOST_NAMED))


def tell_presence(out: Console, rows: Sequence[Row]) -> None:
    """Tables of what tells which classes are there, one for each kind of prompts in which it was measured."""
    for kind in presence_lines(rows):
        miou = f"mIoU {number(kind.miou)}"
        if kind.present and kind.miou:
            miou += f", {kind.present[0] - kind.miou[0]:.1f} below present classes alone"
        asked = f"Is it there? {ASKED[kind.prompts].capitalize()}, {kind.setting.title}, %\n{miou}"
        table = Table("", title=asked, title_justify="left", title_style="bold")
        for title in FIGURES.values():
            table.add_column(title, justify="right")
        for line in kind.lines:
            table.add_row(line.score, *(number(line.figures[name]) for name in FIGURES))
        table.add_row("all are there", "", "", number(kind.f1_of_all), style="dim")
        out.print(table)
