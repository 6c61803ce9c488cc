"""`seg4diff compare RUN RUN`: what the second of two evaluations has more, or less, than the first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seg4diff_jax.convert.files import read_json
from seg4diff_jax.evaluation.options import ASKED, EMPTY, MEAN, Threshold, shown_threshold
from seg4diff_jax.quoting import quoted

RESULTS = "results.json"
SAME = ("dataset", "split", "labels", "background", "unlabelled", "images", "pixels")
"""What rows say of the images that were scored; of two runs all of it must be equal."""
METRICS = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}
SURE = 2
"""Times the seeds' spread: larger differences are printed bold."""


class Key(NamedTuple):
    """What rows of several seeds have in common, and rows of two runs are matched by."""

    protocol: str
    prompts: str
    block: int
    head: int | None
    step: int
    threshold: Threshold | None
    minmax: str | None
    match: str | None
    absent_classes: bool | None
    decoys: int | None
    decoys_seed: int | None
    refined: bool | None

    @property
    def title(self) -> str:
        asked = ASKED.get(self.prompts, ASKED[EMPTY])
        if self.decoys is not None:
            asked += f" ({self.decoys}, seed {self.decoys_seed})"
        head = "" if self.head is None else f", head {self.head}"
        merged = "" if self.threshold is None else f", threshold {shown_threshold(self.threshold)}"
        refined = ", refined masks" if self.refined else ""
        return f"{asked}, block {self.block}{head}, noise level {self.step}{merged}{refined}"


class Difference(NamedTuple):
    """One figure of two runs, in percent.

    Attributes:
      first, second: means over each run's seeds; None where nothing was there to be scored.
      difference: second minus first.
      spread: what seeds alone make differences vary by: the root of the sum of both runs' variances (of a sample).
        None where a run has one seed.
    """

    name: str
    first: float | None
    second: float | None
    difference: float | None
    spread: float | None


Rows = dict[Key, list[dict[str, Any]]]


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("first", type=str, metavar="RUN", help="directory of results of evaluate.py")
    add("second", type=str, metavar="RUN", help="another one, on the same images: differences are this minus the first")
    add("--classes", type=int, default=20, help="classes shown of each row, those that differ most; default: 20")


def run(options: Any) -> None:
    if options.classes < 0:
        raise ValueError(f"--classes is {options.classes}: expected 0 or more")
    first, second = (read_rows(Path(each).expanduser()) for each in (options.first, options.second))
    refuse_others(first, second, options.first, options.second)
    common = [key for key in first if key in second]
    console, notes = Console(highlight=False), Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    console.print(f"A: {options.first}\nB: {options.second}", markup=False, soft_wrap=True)
    for key in common:
        pair = first[key], second[key]
        console.print(table(key.title, "", [compared(*pair, name, title) for name, title in METRICS.items()]))
        by_class = classes_compared(*pair)
        if kept := by_class[: options.classes]:
            console.print(table("", "IoU of class", kept))
        if left := len(by_class) - len(kept):
            console.print(f"and {left} classes that differ less: --classes={len(by_class)} shows all")
    for name, own, other in ((options.first, first, second), (options.second, second, first)):
        if lacking := [key.title for key in own if key not in other]:
            notes.print(f"only {name} has: {'; '.join(lacking)}")
    for remark in remarks({"A": [first[key] for key in common], "B": [second[key] for key in common]}):
        notes.print(remark)


def read_rows(directory: Path) -> Rows:
    """A run's rows, those of several seeds together. Raises ValueError, which names the file, for anything else."""
    path = directory / RESULTS
    contents = read_json(path, "expected the directory of a finished run of evaluate.py")
    rows = contents.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: rows is {quoted(rows)}; expected a list of scores, as evaluate.py writes it")
    found: Rows = {}
    for number, row in enumerate(rows):
        wrong = _misread(row)
        if wrong is None and any(row.get(name) != rows[0].get(name) for name in SAME):
            wrong = "images that are row 0's"
        if wrong is None and list(row["iou"]) != list(rows[0]["iou"]):
            wrong = "classes that are row 0's"
        if wrong:
            raise ValueError(f"{path}: row {number} has no {wrong}, as evaluate.py writes it: the file is damaged")
        key = Key(*(row.get(name) for name in Key._fields))
        found.setdefault(key, []).append(row)
    return found


def _misread(row: Any) -> str | None:
    """What a row lacks, or has of another type."""
    if not isinstance(row, Mapping):
        return "scores"
    kinds: dict[str, Any] = {"protocol": str, "prompts": str, "block": int, "head": int | None, "step": int}
    kinds |= {"threshold": int | float | str | None, "minmax": str | None, "match": str | None}
    kinds |= {"decoys": int | None, "decoys_seed": int | None}
    kinds |= {"seed": int, "images": int, "pixels": int, "dataset": str}
    kinds |= {"miou": int | float | None, "pixel_accuracy": int | float | None, "iou": dict}
    for name, kind in kinds.items():
        if not isinstance(row.get(name), kind) or isinstance(row.get(name), bool):
            return f"usable {name}"
    if isinstance(row.get("threshold"), str) and row["threshold"] != MEAN:
        return "usable threshold"
    for name in ("absent_classes", "refined"):
        if not isinstance(row.get(name), bool | None):
            return f"usable {name}"
    wrong = [name for name, value in row["iou"].items() if not isinstance(value, int | float | None)]
    return f"usable iou of {wrong[0]}" if wrong else None


def refuse_others(first: Rows, second: Rows, one: str, other: str) -> None:
    """Raise ValueError in one sentence when two runs scored other images, or have no row in common."""
    mine, theirs = (next(iter(rows.values()))[0] for rows in (first, second))
    said = [
        f"{name} {quoted(mine.get(name))} and {quoted(theirs.get(name))}"
        for name in SAME
        if mine.get(name) != theirs.get(name)
    ]
    if not said and list(mine["iou"]) != list(theirs["iou"]):
        said = [f"{len(mine['iou'])} and {len(theirs['iou'])} classes, or others"]
    if said:
        raise ValueError(
            f"{one} and {other} did not score the same images, so they cannot be compared: {'; '.join(said)}"
        )
    if not first.keys() & second.keys():
        have = [next(iter(rows)).title for rows in (first, second)]
        raise ValueError(
            f"{one} and {other} have no row in common: the first has {have[0]}, the second {have[1]}; give both runs "
            "the same --prompts, --blocks, --heads and --steps"
        )


# ---- figures --------------------------------------------------------------------------------------------------------


def compared(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], name: str, title: str
) -> Difference:
    """A figure of two runs' rows, one row for each seed."""
    values = [[row[name] for row in rows if row[name] is not None] for rows in (first, second)]
    if not all(values):
        means = [float(np.mean(each)) if each else None for each in values]
        return Difference(title, means[0], means[1], None, None)
    one, other = (float(np.mean(each)) for each in values)
    known = min(map(len, values)) > 1
    spread = math.sqrt(sum(float(np.var(each, ddof=1)) for each in values)) if known else None
    return Difference(title, one, other, other - one, spread)


def classes_compared(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """The IoU of each class that either run has one of, those that differ most first."""
    one, other = ([row["iou"] for row in rows] for rows in (first, second))
    found = [compared(one, other, name, name) for name in one[0]]
    there = [each for each in found if (each.first, each.second) != (None, None)]
    return sorted(there, key=lambda each: -abs(each.difference or 0.0))


def remarks(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[str]:
    """What is to be said of the seeds of the rows that were compared, by run."""
    alone = [name for name, settings in runs.items() if any(len(rows) == 1 for rows in settings)]
    if alone:
        which = f"{' and '.join(alone)} {'has' if len(alone) == 1 else 'have'}"
        return [
            f"{which} one seed only: what seeds alone change is not known, so a difference cannot be judged; measure "
            "both with several, as in --seeds 0,1,2"
        ]
    return [f"*: more than {SURE} times the seeds' spread, the root of the sum of both runs' variances over seeds"]


def table(title: str, what: str, differences: Sequence[Difference]) -> Table:
    made = Table(title=Text(title) if title else None, title_justify="left", title_style="bold")
    made.add_column(what)
    for name in ("A", "B", "B - A", "seeds' spread"):
        made.add_column(name, justify="right")
    number = lambda value: "–" if value is None else f"{value:.2f}"
    for each in differences:
        known = each.difference is not None and each.spread is not None
        sure = known and abs(each.difference or 0.0) > SURE * (each.spread or 0.0)
        change = "–" if each.difference is None else f"{each.difference:+.2f}{' *' if sure else '  '}"
        made.add_row(
            Text(each.name),
            number(each.first),
            number(each.second),
            Text(change, style="bold" if sure else ""),
            number(each.spread),
        )
    return made
