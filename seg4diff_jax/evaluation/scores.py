"""Makes rows of results from counts: the model's scores, and what guessing scores on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer

from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.counts import Counts
from seg4diff_jax.evaluation.further_figures import FurtherFigures, named, presence_figures
from seg4diff_jax.evaluation.measurement import Measurement
from seg4diff_jax.evaluation.options import EMPTY, OPEN_VOCABULARY, UNSUPERVISED, WITH_DECOYS
from seg4diff_jax.evaluation.paper_figures import Figure, reported
from seg4diff_jax.evaluation.percent import mean_percent, percent
from seg4diff_jax.evaluation.rows import ONE_SEGMENT, Metrics, Row, ScoredImages
from seg4diff_jax.evaluation.zero_shot import PERMUTED, RANDOM
from seg4diff_jax.models.lora import attached
from seg4diff_jax.segmentation.boundaries import boundary_iou
from seg4diff_jax.segmentation.metrics import accuracy_per_class, iou_per_class, mean_iou, pixel_accuracy
from seg4diff_jax.segmentation.pointing import pointing_accuracy
from seg4diff_jax.segmentation.unsupervised_scores import MatchCounts

CONSTANT = "constant"


def metrics(confusion: Integer[np.ndarray, "classes classes"], benchmark: Benchmark) -> Metrics:
    """Scores of a confusion matrix: rows are true classes, columns predicted ones."""
    return _metrics(pixel_accuracy(confusion), iou_per_class(confusion), accuracy_per_class(confusion), benchmark)


def match_metrics(counts: MatchCounts, benchmark: Benchmark) -> Metrics:
    """The same of segments that were matched with classes."""
    return _metrics(counts.pixel_accuracy(), counts.iou(), counts.accuracy(), benchmark)


def _metrics(
    right: float,
    iou: Float[np.ndarray, " classes"],
    accuracy: Float[np.ndarray, " classes"],
    benchmark: Benchmark,
) -> Metrics:
    groups = {name: mean_percent(iou[np.asarray(classes, int)]) for name, classes in class_groups(benchmark).items()}
    return Metrics(
        miou=mean_percent(iou),
        mean_accuracy=mean_percent(accuracy),
        pixel_accuracy=percent(right),
        groups=groups,
        iou=named(iou, benchmark.classes),
        accuracy=named(accuracy, benchmark.classes),
    )


def class_groups(benchmark: Benchmark) -> dict[str, Sequence[int]]:
    """Classes that are reported apart; `things` and `stuffs` are always named, without classes where unknown."""
    return {"things": (), "stuffs": (), **benchmark.groups}


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


def score_rows(outcome: Counts, measurement: Measurement) -> list[Row]:
    """Open vocabulary: one for each kind of prompts, step, seed, block and head."""
    settings, benchmark, images = measurement.settings, measurement.benchmark, scored_images(outcome, measurement)
    rows: list[Row] = []
    for one, confusions in zip(measurement.zero_shot.passes, outcome.counted.confusion, strict=True):
        seconds, rate = _speed(outcome, measurement, settings.prompts.index(one.prompts))
        for at, ((readout, below), confusion) in enumerate(zip(settings.readings, confusions, strict=True)):
            row = Row(
                images=images,
                protocol=OPEN_VOCABULARY,
                prompts=one.prompts,
                names=benchmark.names,
                words=benchmark.words,
                below=below,
                metrics=metrics(confusion, benchmark),
                further=further_figures(outcome, measurement, one, at // settings.thresholds_each),
                decoys=settings.decoys if one.prompts in WITH_DECOYS else None,
                block=readout.block,
                head=readout.head,
                refined=readout.refined,
                step=one.step,
                seed=one.seed,
                seconds=seconds,
                images_per_second=rate,
            )
            rows.append(replace(row, reported=_reported(row, measurement)))
    return rows


def further_figures(outcome: Counts, measurement: Measurement, one: tuple, readout: int) -> FurtherFigures:
    """Figures beside mIoU of a pass or guesser, and of a readout given by its place."""
    benchmark, counting, counts = measurement.benchmark, measurement.zero_shot.further, outcome.further
    found: dict[str, Any] = {}
    place = counting.passes.index(one)
    for name, counted, shares in (
        ("boundary_iou", counts.boundary, boundary_iou),
        ("pointing", counts.pointing, pointing_accuracy),
    ):
        if len(counted):
            by_class = shares(counted[place, readout])
            found |= {name: mean_percent(by_class), f"{name}_by_class": named(by_class, benchmark.classes)}
    if one in counting.of_objects:
        found["average_precision"] = mean_percent(counts.average_precision[place, readout])
    if one in counting.asking:
        scores = counts.presence[counting.asking.index(one), readout].copy()
        if benchmark.background is not None and benchmark.rule != "scored":
            scores[:, benchmark.background] = np.nan  # its pixels do not count, so nobody says where it is
        found["presence"] = presence_figures(scores, outcome.histograms, benchmark.classes)
    return FurtherFigures(**found)


def unsupervised_rows(outcome: Counts, measurement: Measurement) -> list[Row]:
    """Segments without names: one for each step, seed, block, head and protocol."""
    settings, matched, images = measurement.settings, outcome.matched, scored_images(outcome, measurement)
    seconds, rate = _speed(outcome, measurement, -1) if settings.unsupervised else (None, None)
    rows: list[Row] = []
    for look, one in enumerate(measurement.unsupervised.looks):
        for at, readout in enumerate(settings.plain_readouts):
            for number, protocol in enumerate(settings.unsupervised):
                counts = MatchCounts(*matched.pixels[look, at, number])
                row = Row(
                    images=images,
                    protocol=UNSUPERVISED,
                    prompts=EMPTY,
                    names=None,
                    metrics=match_metrics(counts, measurement.benchmark),
                    block=readout.block,
                    head=readout.head,
                    step=one.step,
                    seed=one.seed,
                    merging=protocol,
                    segments=_per_image(matched.segments[look, at, number], outcome),
                    seconds=seconds,
                    images_per_second=rate,
                )
                rows.append(replace(row, reported=_reported(row, measurement)))
    return rows


def _speed(outcome: Counts, measurement: Measurement, asked: int) -> tuple[float, float]:
    """Seconds of one pass over the set, and images a second: kinds of prompts share the time by how often the
    transformer was run."""
    settings = measurement.settings
    share = outcome.forwards[asked] / max(1, outcome.forwards.sum()) / (len(settings.steps) * len(settings.seeds))
    seconds = float(outcome.seconds[1] * share)
    return round(seconds, 3), round(len(outcome.indices) / seconds, 2)


def _reported(row: Row, measurement: Measurement) -> tuple[Figure, ...]:
    """What the paper reports for just this."""
    pipe = measurement.forward.pipe
    return reported(row, pipe.transformer.config, pipe.trained_size, attached(pipe.transformer))


def scored_images(outcome: Counts, measurement: Measurement) -> ScoredImages:
    """What is said of the images in every row."""
    benchmark = measurement.benchmark
    return ScoredImages(
        dataset=benchmark.name,
        split=benchmark.split or None,
        labels=benchmark.kind or None,
        background=None if benchmark.background is None else benchmark.rule,
        unlabelled=benchmark.unlabelled,
        list=benchmark.listed,
        resize=measurement.settings.resize,
        lora=measurement.settings.lora,
        images=len(outcome.indices),
        pixels=int(outcome.histograms.sum()),
        cut_off=int(outcome.cut_off.sum()) + sum(each.cut_off for each in outcome.left_out),
        skipped=sum(each.why == "skipped" for each in outcome.left_out),
        unlabelled_images=sum(each.why == "unlabelled" for each in outcome.left_out),
    )


def _per_image(segments: np.int64, outcome: Counts) -> float:
    return round(float(segments) / len(outcome.indices), 2)


def baseline_rows(outcome: Counts, measurement: Measurement) -> list[Row]:
    """What is scored without looking at the image, given the classes that are asked for.

    random: of these classes one at random for each image token, upsampled as the model's scores are.
    constant: everywhere the same class, see `best_constant`; `choice` is the order.
    permuted: the model's own scores, each image's tokens in random order.
    """
    settings, benchmark, counting = measurement.settings, measurement.benchmark, measurement.zero_shot
    images, rows = scored_images(outcome, measurement), []
    for prompts in settings.prompts:
        choice, constant = best_constant(outcome.histograms, known=prompts == "present")
        guess = Row(
            images=images,
            protocol=OPEN_VOCABULARY,
            prompts=prompts,
            names=benchmark.names,
            words=benchmark.words,
            metrics=metrics(constant, benchmark),
            decoys=settings.decoys if prompts in WITH_DECOYS else None,
            baseline=CONSTANT,
        )
        rows.append(replace(guess, choice=choice))
        for number, (kind, seed) in enumerate(counting.guesses):
            if kind != prompts:
                continue
            found = metrics(outcome.counted.random[number, 0], benchmark)
            rows.append(replace(guess, baseline=RANDOM, seed=seed, metrics=found))
            permuted = replace(guess, baseline=PERMUTED, step=settings.steps[0], seed=seed)
            for at, (readout, below) in enumerate(settings.readings):
                found = metrics(outcome.counted.permuted[number, at], benchmark)
                further = further_figures(outcome, measurement, (PERMUTED, kind, seed), at // settings.thresholds_each)
                row = replace(permuted, **readout._asdict(), below=below, metrics=found)
                rows.append(replace(row, further=further))
    return rows


def unsupervised_baselines(outcome: Counts, measurement: Measurement) -> list[Row]:
    """What is scored without looking, matched as the model's segments are.

    one_segment: each image is one; whatever the threshold.
    permuted: the model's own maps, each image's tokens in random order: as many segments, in random places.
    """
    settings, matched = measurement.settings, outcome.matched
    if not settings.unsupervised:
        return []
    score = lambda pixels: match_metrics(MatchCounts(*pixels), measurement.benchmark)
    guess = Row(
        images=scored_images(outcome, measurement),
        protocol=UNSUPERVISED,
        prompts=EMPTY,
        names=None,
        metrics=score(matched.one_segment[0, 0, 0]),
        merging=settings.unsupervised[0],
        segments=1.0,
        baseline=ONE_SEGMENT,
    )
    rows = [guess]
    for which, protocol in enumerate(settings.unsupervised):
        permuted = replace(guess, baseline=PERMUTED, merging=protocol, step=settings.steps[0])
        for number, seed in enumerate(settings.seeds):
            for at, (block, head, _) in enumerate(settings.plain_readouts):
                segments = _per_image(matched.permuted_segments[number, at, which], outcome)
                found = score(matched.permuted[number, at, which])
                rows.append(replace(permuted, block=block, head=head, seed=seed, segments=segments, metrics=found))
    return rows
