"""What has been counted, as rows of plain values: how each was made, and its scores in percent."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from seg4diff_jax.evaluation.counting import Measurement
from seg4diff_jax.evaluation.counts import Counts
from seg4diff_jax.evaluation.options import EMPTY, OPEN_VOCABULARY, UNSUPERVISED
from seg4diff_jax.evaluation.published import reported
from seg4diff_jax.evaluation.scores import Row, best_constant, match_metrics, metrics
from seg4diff_jax.evaluation.unsupervised import ONE_SEGMENT
from seg4diff_jax.evaluation.zero_shot import PERMUTED, RANDOM
from seg4diff_jax.models.lora import attached
from seg4diff_jax.segmentation.unsupervised_scores import MatchCounts, UnsupervisedProtocol


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
                row["segments"] = _mean(matched.segments[look, at, number], outcome)
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
    told = {"protocol": OPEN_VOCABULARY, "prompts": prompts, "names": measurement.benchmark.names}
    return _common(outcome, measurement) | told


def _merged(outcome: Counts, measurement: Measurement, protocol: UnsupervisedProtocol) -> Row:
    told: Row = {"protocol": UNSUPERVISED, "prompts": EMPTY, "names": None}
    return _common(outcome, measurement) | told | asdict(protocol)


def _mean(segments: np.int64, outcome: Counts) -> float:
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
                seen["segments"] = _mean(matched.permuted_segments[number, at, which], outcome)
                rows.append({**common, **seen} | score(matched.permuted[number, at, which]))
    return rows
