"""From what has been counted to rows of plain values: how each was made, what it scores, and what guessing scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.counts import Counts
from seg4diff_jax.evaluation.measurement import Measurement
from seg4diff_jax.evaluation.options import EMPTY, OPEN_VOCABULARY, UNSUPERVISED
from seg4diff_jax.evaluation.paper_figures import reported
from seg4diff_jax.evaluation.readouts import Readout
from seg4diff_jax.evaluation.unsupervised import ONE_SEGMENT
from seg4diff_jax.evaluation.zero_shot import PERMUTED, RANDOM
from seg4diff_jax.models.lora import attached
from seg4diff_jax.segmentation.metrics import accuracy_per_class, iou_per_class, mean_iou, pixel_accuracy
from seg4diff_jax.segmentation.unsupervised_scores import MatchCounts, UnsupervisedProtocol

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


def score_rows(outcome: Counts, measurement: Measurement) -> list[Row]:
    """Open vocabulary: one for each kind of prompts, step, seed, block and head."""
    settings, benchmark = measurement.settings, measurement.benchmark
    rows: list[Row] = []
    for one, confusions in zip(measurement.zero_shot.passes, outcome.counted.confusion, strict=True):
        speed = _speed(outcome, measurement, settings.prompts.index(one.prompts))
        for readout, confusion in zip(settings.readouts, confusions, strict=True):
            seen = {**readout._asdict(), "step": one.step, "seed": one.seed}
            row = {**_asked(outcome, measurement, one.prompts), **speed, **seen}
            rows.append(row | {"reported": _reported(row, measurement)} | metrics(confusion, benchmark))
    return rows


def unsupervised_rows(outcome: Counts, measurement: Measurement) -> list[Row]:
    """Segments without names: one for each step, seed, block, head and protocol; `segments` an image has on average."""
    settings, matched = measurement.settings, outcome.matched
    rows: list[Row] = []
    for look, one in enumerate(measurement.unsupervised.looks):
        for at, readout in enumerate(settings.readouts):
            for number, protocol in enumerate(settings.unsupervised):
                speed = _speed(outcome, measurement, -1)
                seen = {**readout._asdict(), "step": one.step, "seed": one.seed}
                row = {**_merged(outcome, measurement, protocol), **speed, **seen}
                row["reported"] = _reported(row, measurement)
                row["segments"] = _per_image(matched.segments[look, at, number], outcome)
                counts = MatchCounts(*matched.pixels[look, at, number])
                rows.append(row | match_metrics(counts, measurement.benchmark))
    return rows


def _speed(outcome: Counts, measurement: Measurement, asked: int) -> Row:
    """The time of one pass over the set: kinds of prompts share the time by how often the transformer was run."""
    settings = measurement.settings
    share = outcome.forwards[asked] / max(1, outcome.forwards.sum()) / (len(settings.steps) * len(settings.seeds))
    seconds = float(outcome.seconds[1] * share)
    return {"seconds": round(seconds, 3), "images_per_second": round(len(outcome.indices) / seconds, 2)}


def _reported(row: Row, measurement: Measurement) -> list[Row]:
    """What the paper reports for just this, as `results.json` has it."""
    pipe = measurement.forward.pipe
    found = reported(row, pipe.transformer.config, pipe.trained_size, attached(pipe.transformer))
    return [{"name": figure.title, "miou": figure.miou, "source": figure.source} for figure in found]


def _common(outcome: Counts, measurement: Measurement) -> Row:
    benchmark = measurement.benchmark
    return {
        "dataset": benchmark.name,
        "split": benchmark.split or None,
        "labels": benchmark.kind or None,
        "background": None if benchmark.background is None else benchmark.rule,
        "unlabelled": benchmark.unlabelled,
        "list": benchmark.listed,
        "resize": measurement.settings.resize,
        "lora": measurement.settings.lora,
        "images": len(outcome.indices),
        "pixels": int(outcome.histograms.sum()),
        "cut_off": int(outcome.cut_off.sum()) + sum(each.cut_off for each in outcome.left_out),
        "skipped": sum(each.why == "skipped" for each in outcome.left_out),
        "unlabelled_images": sum(each.why == "unlabelled" for each in outcome.left_out),
    }


def _asked(outcome: Counts, measurement: Measurement, prompts: str) -> Row:
    setting = {"protocol": OPEN_VOCABULARY, "prompts": prompts, "names": measurement.benchmark.names}
    return _common(outcome, measurement) | setting


def _merged(outcome: Counts, measurement: Measurement, protocol: UnsupervisedProtocol) -> Row:
    setting: Row = {"protocol": UNSUPERVISED, "prompts": EMPTY, "names": None}
    return _common(outcome, measurement) | setting | asdict(protocol)


def _per_image(segments: np.int64, outcome: Counts) -> float:
    return round(float(segments) / len(outcome.indices), 2)


def baseline_rows(outcome: Counts, measurement: Measurement) -> list[Row]:
    """What is scored without looking at the image, given the classes that are asked for.

    random: of these classes one at random for each image token, upsampled as the model's scores are.
    constant: everywhere the same class, see `scores.best_constant`; `choice` is the order.
    permuted: the model's own scores, each image's tokens in random order.
    """
    settings, benchmark, counting = measurement.settings, measurement.benchmark, measurement.zero_shot
    nowhere = dict.fromkeys(("block", "head", "step", "seed"))
    rows: list[Row] = []
    for prompts in settings.prompts:
        common = _asked(outcome, measurement, prompts)
        choice, constant = best_constant(outcome.histograms, known=prompts == "present")
        place: dict[str, Any] = {"baseline": "constant", "choice": choice, **nowhere}
        rows.append({**common, **place} | metrics(constant, benchmark))
        for number, (kind, seed) in enumerate(counting.guesses):
            if kind != prompts:
                continue
            place = {"baseline": RANDOM, **nowhere, "seed": seed}
            rows.append({**common, **place} | metrics(outcome.counted.random[number, 0], benchmark))
            seen = {"baseline": PERMUTED, "step": settings.steps[0], "seed": seed}
            permuted = zip(settings.readouts, outcome.counted.permuted[number], strict=True)
            rows += [{**common, **seen, **readout._asdict()} | metrics(each, benchmark) for readout, each in permuted]
    return rows


def unsupervised_baselines(outcome: Counts, measurement: Measurement) -> list[Row]:
    """What is scored without looking, matched as the model's segments are.

    one_segment: each image is one; whatever the threshold.
    permuted: the model's own maps, each image's tokens in random order: as many segments, in random places.
    """
    settings, matched = measurement.settings, outcome.matched
    rows: list[Row] = []
    for which, protocol in enumerate(settings.unsupervised):
        common = _merged(outcome, measurement, protocol)
        score = lambda pixels: match_metrics(MatchCounts(*pixels), measurement.benchmark)
        if not which:
            nowhere = {**dict.fromkeys(("threshold", "block", "head", "step", "seed")), "segments": 1.0}
            rows.append({**common, "baseline": ONE_SEGMENT, **nowhere} | score(matched.one_segment[0, 0, 0]))
        for number, seed in enumerate(settings.seeds):
            for at, readout in enumerate(settings.readouts):
                seen = {"baseline": PERMUTED, **readout._asdict(), "step": settings.steps[0], "seed": seed}
                seen["segments"] = _per_image(matched.permuted_segments[number, at, which], outcome)
                rows.append({**common, **seen} | score(matched.permuted[number, at, which]))
    return rows
