"""From confusion matrices to the numbers that are reported, in percent, and what guessing would score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.readouts import Readout
from seg4diff_jax.segmentation.metrics import accuracy_per_class, iou_per_class, mean_iou, pixel_accuracy
from seg4diff_jax.segmentation.unsupervised_scores import MatchCounts

Row = dict[str, Any]
BASELINES = {
    "random": "random classes (chance)",
    "constant": "one class everywhere",
    "permuted": "positions permuted",
    "one_segment": "each image one segment",
}
"""What each guesser is called."""


class Setting(NamedTuple):
    """What rows of several seeds have in common: what was asked for, or below which divergence maps were merged."""

    block: int
    step: int
    prompts: str
    threshold: float | None = None
    head: int | None = None

    @property
    def readout(self) -> Readout:
        return Readout(self.block, self.head)

    @property
    def title(self) -> str:
        head = "" if self.head is None else f", head {self.head}"
        merged = "" if self.threshold is None else f", threshold {self.threshold:g}"
        return f"block {self.block}{head}, noise level {self.step}{merged}"


def metrics(confusion: Integer[np.ndarray, "classes classes"], benchmark: Benchmark) -> Row:
    """`miou`, `mean_accuracy`, `pixel_accuracy`, the mean IoU of each of the benchmark's groups, and `iou` and
    `accuracy` by class, in percent.

    None where nothing was there to be scored.
    """
    return _scores(pixel_accuracy(confusion), iou_per_class(confusion), accuracy_per_class(confusion), benchmark)


def match_metrics(counts: MatchCounts, benchmark: Benchmark) -> Row:
    """The same of segments that were matched with classes."""
    return _scores(counts.pixel_accuracy(), counts.iou(), counts.accuracy(), benchmark)


def _scores(
    right: float,
    iou: Float[np.ndarray, " classes"],
    accuracy: Float[np.ndarray, " classes"],
    benchmark: Benchmark,
) -> Row:
    named = lambda scores: dict(zip(benchmark.classes, map(_percent, scores.tolist()), strict=True))
    return {
        "miou": _mean(iou),
        "mean_accuracy": _mean(accuracy),
        "pixel_accuracy": _percent(right),
        **{name: _mean(iou[np.asarray(classes, int)]) for name, classes in class_groups(benchmark).items()},
        "iou": named(iou),
        "accuracy": named(accuracy),
    }


def class_groups(benchmark: Benchmark) -> dict[str, Sequence[int]]:
    """Classes that are reported apart; `things` and `stuffs` are always named, without classes where unknown."""
    return {"things": (), "stuffs": (), **benchmark.groups}


def _mean(scores: Float[np.ndarray, " classes"]) -> float | None:
    known = scores[~np.isnan(scores)]
    return _percent(float(known.mean())) if len(known) else None


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else round(100 * share, 4)


def constant_choices(
    histograms: Int[np.ndarray, "images classes"], *, known: bool = True
) -> dict[str, Int[np.ndarray, "classes classes"]]:
    """Confusion matrices of two guessers that do not look: each image is wholly the first of its classes in one order.

    The orders are read off the same images' labels: by pixels in the whole set (`commonest`), and by the mean share of
    the images that a class is in (`largest`).

    Args:
      known: the guesser knows which classes an image has. Otherwise all images are of one class, the first of all.
    """
    present = histograms > 0
    shares = histograms / np.maximum(histograms.sum(axis=1, keepdims=True), 1)
    ranks = {
        "commonest": histograms.sum(axis=0).astype(np.float64),
        "largest": shares.sum(axis=0) / np.maximum(present.sum(axis=0), 1),
    }
    found = {}
    for name, rank in ranks.items():
        chosen = np.where(present | (not known), rank, -1.0).argmax(axis=1)
        confusion = np.zeros((histograms.shape[1],) * 2, np.int64)
        np.add.at(confusion.T, chosen, histograms)
        found[name] = confusion
    return found


def best_constant(
    histograms: Int[np.ndarray, "images classes"], *, known: bool = True
) -> tuple[str, Int[np.ndarray, "classes classes"]]:
    """The better of `constant_choices` by mean IoU, and its name."""
    choices = constant_choices(histograms, known=known)
    name = max(choices, key=lambda name: mean_iou(choices[name]))
    return name, choices[name]


def averaged(rows: Sequence[Row], names: Sequence[str]) -> dict[str, tuple[float, float] | None]:
    """Mean over seeds and how far they spread (the standard deviation of a sample; 0 for one seed), for each metric."""
    found: dict[str, tuple[float, float] | None] = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        found[name] = (float(np.mean(values)), spread) if values else None
    return found


def by_setting(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """Rows of one setting together, in the order in which they come: one for each seed."""
    settings: dict[Setting, list[Row]] = {}
    for row in rows:
        setting = Setting(row["block"], row["step"], row["prompts"], row.get("threshold"), row.get("head"))
        settings.setdefault(setting, []).append(row)
    return settings


def best_setting(rows: Sequence[Row]) -> Setting:
    """The highest mean IoU, averaged over seeds, with the prompts of the first row.

    Not one that has no mean IoU at one of its seeds, unless no setting has.
    """
    known = lambda miou: miou if miou is not None and np.isfinite(miou) else -np.inf
    mean = lambda some: np.mean([known(row["miou"]) for row in some])
    settings: Mapping[Setting, list[Row]] = by_setting(rows)
    alike = [setting for setting in settings if setting.prompts == rows[0]["prompts"]]
    return max(alike, key=lambda setting: mean(settings[setting]))


def guesses(baselines: Sequence[Row], best: Setting) -> dict[str, list[Row]]:
    """Rows of each baseline with the same prompts, one for each seed; of permuted maps those of the best readout."""
    named: dict[str, list[Row]] = {}
    for row in sorted(baselines, key=lambda row: row["baseline"] != "random"):
        alike = row["prompts"] == best.prompts and row.get("threshold") in (None, best.threshold)
        if alike and (row["block"] is None or Readout(row["block"], row.get("head")) == best.readout):
            named.setdefault(row["baseline"], []).append(row)
    return named
