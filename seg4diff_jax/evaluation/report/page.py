"""An evaluation as one page for a browser and for print: `report.html`, which needs nothing beside it.

What it shows is put together here; how it looks is `templates/report.html.jinja` and `reporting/templates/page.css`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.both_ways import COLUMNS, both_ways
from seg4diff_jax.evaluation.options import OPEN_VOCABULARY, UNSUPERVISED
from seg4diff_jax.evaluation.paper_figures import Figure
from seg4diff_jax.evaluation.presence_lines import FIGURES, presence_lines
from seg4diff_jax.evaluation.report.confusions import confused
from seg4diff_jax.evaluation.report.images import Card, card, segments_card
from seg4diff_jax.evaluation.report.plots import Sweep, plots
from seg4diff_jax.evaluation.rows import (
    BASELINES,
    Row,
    Setting,
    averaged,
    best_setting,
    by_setting,
    guesses,
    mean_figures,
)
from seg4diff_jax.evaluation.scores import class_groups
from seg4diff_jax.reporting.colors import class_colors, hexadecimal, ink_on, tint
from seg4diff_jax.reporting.page_templates import page_environment

if TYPE_CHECKING:
    from seg4diff_jax.evaluation.run import Evaluation

PAGE = "report.html"
WORST_CLASSES = 8
MOST_SETTINGS = 200
"""Lines of the table of all settings; `results.json` has more."""
MOST_NAMED = 20
"""Images that were left out, by name."""
TITLES = {
    "miou": "mIoU",
    "mean_accuracy": "mACC",
    "pixel_accuracy": "pixel accuracy",
    "boundary_iou": "boundary IoU",
    "pointing": "pointing game",
    "average_precision": "mAP",
    "segments": "segments",
}
PROTOCOL_NAMES = {OPEN_VOCABULARY: "open-vocabulary", UNSUPERVISED: "unsupervised"}
ASKED = {
    "present": "asked for the classes present",
    "all": "asked for the whole vocabulary",
    "decoys": "asked for the classes present and decoys",
    "lookalikes": "asked for the classes present and lookalikes",
}

Score = tuple[float, float] | None
"""Mean over seeds and spread, percent; None where there was nothing to score."""


class Way(NamedTuple):
    """What rows have in common whose scores can be compared: what the model was told."""

    protocol: str
    prompts: str | None

    @property
    def title(self) -> str:
        if self.protocol == UNSUPERVISED:
            return "divided into segments without names"
        return ASKED.get(self.prompts or "", str(self.prompts))


@dataclass(frozen=True)
class Line:
    """A line of a table of scores. `reported`: the paper's figures for it; `remark`: how a guesser guesses."""

    title: str
    scores: dict[str, Score]
    reported: Sequence[Figure] = ()
    remark: str = ""
    best: bool = False
    guess: bool = False


def write_page(
    directory: Path, evaluation: Evaluation, benchmark: Benchmark, config: Mapping[str, Any], made: Mapping[str, Any]
) -> None:
    """Write `report.html` into a directory that exists.

    Args:
      config: what was run, plain values; `model` is told in the heading, all of it at the end.
      made: `device`, `versions` and `seconds` as `results.json` has them.
    """
    environment = page_environment("evaluation/report/templates")
    environment.filters |= {"number": number, "plain": plain, "tint": shade}
    page = environment.get_template("report.html.jinja").render(contents(evaluation, benchmark, config, made))
    (directory / PAGE).write_text(page + "\n", encoding="utf-8")


def contents(
    evaluation: Evaluation, benchmark: Benchmark, config: Mapping[str, Any], made: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the template names."""
    rows = evaluation.rows
    best = by_setting(rows)[evaluation.best]
    names = [
        "miou",
        "mean_accuracy",
        "pixel_accuracy",
        *class_groups(benchmark),
        "boundary_iou",
        "pointing",
        "average_precision",
        "segments",
    ]
    known = {name for row in rows for name, figure in row.figures.items() if figure is not None}
    names = [name for name in names if name == "miou" or name in known]
    ways, images, best_iou = by_way(rows), rows[0].images, mean_iou(best, benchmark.classes)
    seeds = len({row.seed for row in rows})
    protocols = list(dict.fromkeys(PROTOCOL_NAMES.get(way.protocol, way.protocol) for way in ways))
    tables = [(way.title, summary(evaluation, some, names)) for way, some in ways.items()]
    return {
        "title": f"Zero-shot {' and '.join(protocols)} segmentation",
        "model": config["model"] + (f" with {config['lora']}" if config.get("lora") else ""),
        "benchmark": benchmark,
        "images": images.images,
        "ways": [way.title for way in ways],
        "metrics": {name: TITLES.get(name, name) for name in names},
        "seeds": seeds,
        "best": evaluation.best,
        "best_way": Way(best[0].protocol, best[0].prompts).title,
        "scores": mean_figures(best, names),
        "reported": best[0].reported,
        "speed": mean_figures(best, ["images_per_second"])["images_per_second"],
        "both_ways": both_ways(rows, evaluation.baselines),
        "ways_asked": COLUMNS,
        "tables": tables,
        "any_reported": any(line.reported for _, lines in tables for line in lines),
        "plots": plots([sweep(way, some) for way, some in ways.items()], best_guess(evaluation)),
        "settings": settings(ways, names),
        "unlisted": len(by_setting(rows)) if len(by_setting(rows)) > MOST_SETTINGS else 0,
        "classes": class_bars(evaluation, benchmark, ways),
        "absent": [name for name in benchmark.classes if best_iou[name] is None],
        "others": [way.title for way in ways][1:2],
        "confused": worst_classes(evaluation, benchmark),
        "presence": presence_lines(rows),
        "presence_figures": FIGURES,
        "asked": ASKED,
        "colors": [hexadecimal(color) for color in class_colors(len(benchmark.classes))],
        "grids": grids(evaluation, benchmark, ways),
        "cut_off": images.cut_off,
        "cut_off_share": 100 * images.cut_off / max(1, images.cut_off + images.pixels),
        "left_out": {"skipped": evaluation.skipped, "without a labelled pixel": evaluation.unlabelled},
        "most_named": MOST_NAMED,
        "config": flat(config),
        "made": made,
    }


# ---- numbers --------------------------------------------------------------------------------------------------------


def number(value: Score, digits: int = 1) -> str:
    """Mean and spread over seeds for reading; nothing where there was nothing to score."""
    if value is None:
        return "–"
    mean, spread = value
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else "")


def plain(value: Score, digits: int = 1) -> str:
    """The mean alone."""
    return number(value and (value[0], 0.0), digits)


def shade(percent: float) -> Markup:
    """A cell's colours, the darker the greater its share, as a style sheet writes them."""
    color = tint(percent / 100)
    return Markup("background:{};color:{}").format(hexadecimal(color), hexadecimal(ink_on(color)))


def mean_iou(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, Score]:
    """The IoU of each class over seeds."""
    return averaged([row.metrics.iou for row in rows], classes)


def by_way(rows: Sequence[Row]) -> dict[Way, list[Row]]:
    """Rows of one protocol and kind of prompts together, in the order in which they come."""
    ways: dict[Way, list[Row]] = {}
    for row in rows:
        ways.setdefault(Way(row.protocol, row.prompts), []).append(row)
    return ways


# ---- tables ---------------------------------------------------------------------------------------------------------


def summary(evaluation: Evaluation, rows: list[Row], names: list[str]) -> list[Line]:
    """The best setting of a way of asking, the best by the mean of heads, the paper's, and what guessing scores."""
    best = best_setting(rows)
    of_all_heads = best_setting(means) if (means := [row for row in rows if row.head is None]) else best
    lines = []
    for setting, some in by_setting(rows).items():
        reported = some[0].reported
        if setting in (best, of_all_heads) or reported:
            lines.append(Line(setting.title, mean_figures(some, names), reported, best=setting == best))
    lines.sort(key=lambda line: not line.best)
    for name, some in guesses(evaluation.baselines, best).items():
        lines.append(Line(guess_title(name), mean_figures(some, names), remark=_remark(some[0]), guess=True))
    return lines


def guess_title(name: str) -> str:
    return BASELINES[name]


def _remark(row: Row) -> str:
    of = {"present": "present", "all": "in the vocabulary"}.get(row.prompts, "asked for")
    return {
        "random": f"for each image token one of the classes {of}",
        "constant": f"the {row.choice} of those {'present' if row.prompts == 'present' else 'in the vocabulary'}",
        "permuted": f"block {row.block}'s own maps{_of_head(row.head)} in random places",
    }.get(row.baseline or "", "")


def _of_head(head: int | None) -> str:
    return "" if head is None else f" of head {head}"


def settings(ways: Mapping[Way, list[Row]], names: list[str]) -> list[tuple[str, list[Line]]]:
    """All blocks, heads and noise levels, where there are several, up to `MOST_SETTINGS`."""
    tables = []
    for way, rows in ways.items():
        best, lines = best_setting(rows), []
        for setting, some in by_setting(rows).items():
            lines.append(Line(setting.title, mean_figures(some, names), some[0].reported, best=setting == best))
        tables.append((way.title, lines))
    count = sum(len(lines) for _, lines in tables)
    return tables if len(tables) < count <= MOST_SETTINGS else []


def sweep(way: Way, rows: Sequence[Row]) -> Sweep:
    """Mean IoU of a way of asking by block, noise level and head, at the threshold of its best."""
    best = best_setting(rows)
    settings = by_setting([row for row in rows if row.threshold == best.threshold])
    scores = {at: mean_figures(some, ["miou"])["miou"] for at, some in settings.items()}
    # The same number means another head in another block: lines over blocks are of the mean, where it was measured.
    read = None if any(at.head is None for at in scores) else best.head
    levels = {(at.block, at.step): score for at, score in scores.items() if at.head == read}
    heads = {(at.block, at.head): score for at, score in scores.items() if at.head is not None and at.step == best.step}
    return Sweep(way.title, levels, heads, (best.block, best.step), best.head, read)


def best_guess(evaluation: Evaluation) -> tuple[str, float] | None:
    """What guessing scores at best beside the best setting."""
    scores = {
        guess_title(name): mean_figures(some, ["miou"])["miou"]
        for name, some in guesses(evaluation.baselines, evaluation.best).items()
    }
    known = [(name, score[0]) for name, score in scores.items() if score]
    return max(known, key=lambda guess: guess[1], default=None)


# ---- classes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A class's IoU at the best setting. `other`: with the second way of asking."""

    name: str
    color: str
    score: tuple[float, float]
    other: Score


def class_bars(
    evaluation: Evaluation, benchmark: Benchmark, ways: Mapping[Way, list[Row]]
) -> list[tuple[str, Score, list[Bar]]]:
    """Groups of classes, their mean IoU, and their classes from the highest IoU to the lowest."""
    rows = by_setting(evaluation.rows)[evaluation.best]
    scores = mean_iou(rows, benchmark.classes)
    second = [by_setting(some)[best_setting(some)] for some in ways.values()][1:2]
    others = mean_iou(second[0], benchmark.classes) if second else {}
    colors = class_colors(len(benchmark.classes))
    grouped = {name: list(classes) for name, classes in class_groups(benchmark).items() if classes}
    found = []
    for title, classes in (grouped or {"all classes": list(range(len(benchmark.classes)))}).items():
        bars = [
            Bar(name, hexadecimal(colors[index]), score, others.get(name))
            for index in classes
            if (score := scores[name := benchmark.classes[index]]) is not None
        ]
        bars.sort(key=lambda bar: -bar.score[0])
        whole = title if title in rows[0].metrics.groups else "miou"
        found.append((title, mean_figures(rows, [whole])[whole], bars))
    return found


def worst_classes(evaluation: Evaluation, benchmark: Benchmark) -> list[dict[str, Any]]:
    """The classes with the lowest IoU at the best setting, and what they are confused with."""
    if evaluation.confusion is None:
        return []
    scores = mean_iou(by_setting(evaluation.rows)[evaluation.best], benchmark.classes)
    known = [(score[0], index) for index, name in enumerate(benchmark.classes) if (score := scores[name])]
    worst = [index for _, index in sorted(known)[:WORST_CLASSES]]
    return [
        {"name": (name := benchmark.classes[one.index]), "iou": scores[name], **one._asdict()}
        for one in confused(evaluation.confusion, worst)
    ]


@dataclass(frozen=True)
class Grid:
    """Images segmented in one way.

    Attributes:
      title: what the model was told; `setting` is how it segments them best.
      match: what is matched with the classes by itself, None where classes have names.
      absent_classes: they are matched too.
      cards: by why they are shown.
    """

    title: str
    setting: Setting
    match: str | None
    absent_classes: bool
    cards: dict[str, list[Card]]


def grids(evaluation: Evaluation, benchmark: Benchmark, ways: Mapping[Way, list[Row]]) -> list[Grid]:
    """Images of each protocol that was run, if any are to be shown."""
    found = []
    for way, rows in ways.items():
        best, match, absent_classes = best_setting(rows), None, False
        cards: list[Card] = []
        if merging := rows[0].merging:
            match, absent_classes = merging.match, merging.absent_classes
            cards = [segments_card(one, benchmark.classes, by_rows=match == "row") for one in evaluation.divided]
        elif best == evaluation.best:
            cards = [card(one, benchmark.classes) for one in evaluation.shown]
        if cards:
            by_why = {why: list(some) for why, some in groupby(cards, key=attrgetter("why"))}
            found.append(Grid(way.title, best, match, absent_classes, by_why))
    return found


def flat(config: Mapping[str, Any]) -> dict[str, str]:
    """Options under their dotted names, for reading."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
    listed = lambda value: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return {name: "–" if value is None else listed(value) for name, value in found.items()}
