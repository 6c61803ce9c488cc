"""One evaluation: a model on a benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from seg4diff_jax.compilation import CompilationClock
from seg4diff_jax.evaluation.batches import Example, PresentClasses, Reader, assemble, batches
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.scores import Row, best_constant, best_setting, metrics
from seg4diff_jax.evaluation.zero_shot import PERMUTED, RANDOM, Pass, ZeroShot
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.segmentation.open_vocabulary import upsampled_labels

PROTOCOL = "open_vocabulary"


@dataclass(frozen=True)
class Settings:
    """What is measured: all blocks, at every noise level (1 clean to 28 noise), for every seed of the noise."""

    blocks: tuple[int, ...]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    batch_size: int
    skip_unreadable: bool = False


@dataclass(frozen=True)
class Shown:
    """One image of the data set for people to look at.

    Attributes:
      example: the image, its labels and name; `image` are its pixels as they are.
      predicted: class of every pixel.
      classes: those that were asked for; `scores` are theirs, on the grid of image tokens.
      accuracy: percent of the labelled pixels that are right.
    """

    example: Example
    image: np.ndarray
    predicted: Int[np.ndarray, "height width"]
    classes: tuple[int, ...]
    scores: Float[np.ndarray, "classes rows columns"]
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """What came out. Rows are plain values, scores in percent; `seconds` are compiling and running.

    Attributes:
      rows: one for each block, step and seed.
      baselines: guessers on the same images, `baseline` says which: see `baseline_rows`.
      shown: images spread from the best to the worst, segmented at `best`, the block and step of the highest mIoU.
    """

    rows: list[Row]
    baselines: list[Row]
    best: tuple[int, int]
    shown: list[Shown]
    skipped: list[str]
    unlabelled: list[str]
    seconds: dict[str, float]


def evaluate(
    pipe: Pipeline,
    benchmark: Benchmark,
    settings: Settings,
    *,
    shown: int = 0,
    progress: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Zero-shot scores of a model on a benchmark, each image asked for its own classes.

    Args:
      shown: how many images to segment once more, for people to look at.
      progress: told how many images are done.

    Raises:
      ImageError, FolderError: an image or a label is not usable.
      ValueError: class names do not make prompts, or no image is left.
      FloatingPointError: scores are not finite.
    """
    size = (pipe.trained_size, pipe.trained_size)
    reader = Reader(benchmark, size, skip_unreadable=settings.skip_unreadable, ahead=2 * settings.batch_size)
    asked = PresentClasses(pipe.tokenizers, benchmark.prompts, repeats=benchmark.names == "release")
    counting = ZeroShot(
        pipe, len(benchmark.classes), blocks=settings.blocks, steps=settings.steps, seeds=settings.seeds
    )
    seen: list[tuple[int, Int[np.ndarray, " classes"]]] = []
    with CompilationClock() as compilation:
        start = time.perf_counter()
        for batch in batches(reader, settings.batch_size, asked):
            counting.add(batch)
            seen += [(example.index, example.histogram) for example in batch.examples]
            progress(len(seen))
        counting.finish()
        totals = {name: tally.total() for name, tally in counting.tallies.items()}
        total = time.perf_counter() - start
    if not seen:
        raise ValueError(f"{benchmark.where}: no image is left to score: {_left_out(reader)}")
    seconds = {"compiling": compilation.seconds, "running": total - compilation.seconds}
    each = seconds["running"] / len(counting.passes)
    common = {"dataset": benchmark.name, "split": benchmark.split or None, "labels": benchmark.kind or None}
    common |= {"background": None if benchmark.background is None else benchmark.rule}
    common |= {"protocol": PROTOCOL, "prompts": asked.name, "names": benchmark.names}
    common |= {"images": len(seen), "seconds": round(each, 3), "images_per_second": round(len(seen) / each, 2)}
    rows = [
        {**common, "block": block, "step": one.step, "seed": one.seed, **metrics(totals[one][place], benchmark)}
        for one in counting.passes
        for place, block in enumerate(settings.blocks)
    ]
    histograms = np.stack([histogram for _, histogram in seen])
    baselines = baseline_rows(totals, histograms, benchmark, settings, {**common, "seconds": None})
    best = best_setting(rows)
    pictures = _shown(counting, reader, asked, seen, settings, best, shown) if shown else []
    return Evaluation(rows, baselines, best, pictures, reader.skipped, reader.unlabelled, seconds)


def baseline_rows(
    totals: dict[Any, np.ndarray],
    histograms: Int[np.ndarray, "images classes"],
    benchmark: Benchmark,
    settings: Settings,
    common: Row,
) -> list[Row]:
    """What is scored without looking at the image, given the classes that are in it.

    random: of the classes present one at random for each image token, upsampled as the model's scores are.
    constant: everywhere the same class of those present, see `scores.best_constant`; `choice` is the order.
    permuted: the model's own scores, each image's tokens in random order.
    """
    common = {key: value for key, value in common.items() if not key.startswith(("seconds", "images_per"))}
    choice, constant = best_constant(histograms)
    rows: list[Row] = [
        {**common, "baseline": "constant", "choice": choice, "block": None, "step": None, "seed": None}
        | metrics(constant, benchmark)
    ]
    for seed in settings.seeds:
        place = {**common, "step": None, "seed": seed}
        rows.append({**place, "baseline": RANDOM, "block": None} | metrics(totals[RANDOM, seed][0], benchmark))
        rows += [
            {**place, "baseline": PERMUTED, "block": block, "step": settings.steps[0]} | metrics(confusion, benchmark)
            for block, confusion in zip(settings.blocks, totals[PERMUTED, seed], strict=True)
        ]
    return rows


def _left_out(reader: Reader) -> str:
    first = f"; the first: {reader.skipped[0]}" if reader.skipped else ""
    return f"{len(reader.unlabelled)} without a labelled pixel, {len(reader.skipped)} skipped{first}"


def _shown(
    counting: ZeroShot,
    reader: Reader,
    asked: PresentClasses,
    seen: Sequence[tuple[int, Int[np.ndarray, " classes"]]],
    settings: Settings,
    best: tuple[int, int],
    count: int,
) -> list[Shown]:
    """Images evenly spaced from the one with most pixels right to the one with fewest, at the first seed."""
    one, place = Pass(best[1], settings.seeds[0]), settings.blocks.index(best[0])
    right = np.concatenate([piece[place] for piece in counting.right[one]])
    accuracy = 100 * right / np.array([histogram.sum() for _, histogram in seen])
    order = np.argsort(-accuracy, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)].tolist()
    found: list[Shown] = []
    for start in range(0, len(chosen), settings.batch_size):
        some = chosen[start : start + settings.batch_size]
        examples = [reader.example(seen[number][0]) for number in some]
        batch = assemble(examples, settings.batch_size, asked)
        scores = counting.scores(batch, one)[place]
        for number, example, grid in zip(some, examples, scores, strict=False):
            classes, _ = asked(example)
            grid = grid[: len(classes)]
            predicted = np.array(classes, np.int32)[upsampled_labels(grid, example.labels.shape)]
            image = reader.benchmark.source[example.index]["image"]
            found.append(Shown(example, image, predicted, classes, grid, float(accuracy[number])))
    return found
