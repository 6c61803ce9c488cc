"""Evaluations of any size, made up: what a report is made of, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from seg4diff_jax.evaluation.batches import Example
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.further_figures import FurtherFigures, presence_figures
from seg4diff_jax.evaluation.gallery import UNMATCHED, Shown, ShownSegments, pictured
from seg4diff_jax.evaluation.rows import Metrics, Row, ScoredImages, best_setting
from seg4diff_jax.evaluation.run import Evaluation
from seg4diff_jax.evaluation.scores import metrics
from seg4diff_jax.segmentation.unsupervised_scores import UnsupervisedProtocol

MADE = {
    "seconds": {"loading": 3.2, "compiling": 10.0, "running": 61.5},
    "device": {"kind": "cpu", "devices": 1, "processes": 1},
    "versions": {"python": "3.11", "jax": "0.10"},
}
CONFIG = {"model": "sd3", "data": {"name": "made up", "root": None}, "blocks": [0, 1], "steps": [8]}


def made_up_benchmark(names: Sequence[str], things: int = 0) -> Benchmark:
    groups = {"things": range(things), "stuffs": range(things, len(names))} if things else {}
    return Benchmark("made-up", tuple(names), [], groups, split="val")


def confusion_of(classes: int, draw: np.random.Generator, skill: float) -> np.ndarray:
    """Pixels of each class by class taken for: the more on the diagonal the greater the skill, 0..1."""
    sizes = draw.integers(1000, 200_000, classes)
    found = draw.random(classes) ** (0.3 / max(skill, 1e-3))
    spread = draw.dirichlet(np.full(classes, 0.05), classes) * (1 - found)[:, None]
    return np.round((np.diag(found) + spread) * sizes[:, None]).astype(np.int64)


def made_up_evaluation(
    benchmark: Benchmark,
    *,
    blocks: Sequence[int] = (9,),
    steps: Sequence[int] = (8,),
    seeds: Sequence[int] = (0,),
    prompts: Sequence[str | None] = ("present",),
    shown: Sequence[Shown] = (),
    divided: Sequence[ShownSegments] = (),
    change: Callable[[Row], Row] = lambda row: row,
) -> Evaluation:
    """Scores that are highest at the middle block and noise level.

    Args:
      prompts: None for segments without names.
      change: what each row becomes.
    """
    draw = np.random.default_rng(0)
    rows, confusions = [], {}
    for kind in prompts:
        for step in steps:
            for seed in seeds:
                for block in blocks:
                    far = abs(block - blocks[len(blocks) // 2]) + abs(step - steps[len(steps) // 2]) / 4
                    matrix = confusion_of(len(benchmark.classes), draw, np.exp(-far / 3) * (1 if kind else 0.6))
                    confusions[block, step, kind] = matrix
                    scores = metrics(matrix, benchmark)
                    row = replace(_row(benchmark, kind, scores), block=block, step=step, seed=seed)
                    rows.append(change(replace(row, images_per_second=4.0, seconds=15.0)))
    baselines = []
    for kind in prompts:
        for name in ("constant", "random", "permuted") if kind else ("one_segment", "permuted"):
            for block in blocks if name == "permuted" else (None,):
                scores = metrics(confusion_of(len(benchmark.classes), draw, 0.05), benchmark)
                guess = replace(_row(benchmark, kind, scores), baseline=name, choice="commonest", seed=0)
                baselines.append(replace(guess, block=block))
    best = best_setting(rows)
    confusion = confusions.get((best.block, best.step, best.prompts))
    return Evaluation(
        rows, baselines, best, [*shown], [], [], {"compiling": 1.0, "running": 2.0}, confusion, [*divided]
    )


def scored_images(dataset: str, **changes: Any) -> ScoredImages:
    """500 images of a set, all of them scored; `changes` are of its fields."""
    images = ScoredImages(
        dataset=dataset,
        split="val",
        labels=None,
        background=None,
        unlabelled=None,
        list=None,
        resize="square",
        lora=None,
        images=500,
        pixels=10**6,
        cut_off=0,
        skipped=0,
        unlabelled_images=0,
    )
    return replace(images, **changes)


def _row(benchmark: Benchmark, prompts: str | None, scores: Metrics) -> Row:
    images = scored_images(benchmark.name)
    if prompts is None:
        return Row(images, "unsupervised", "empty", None, scores, merging=UnsupervisedProtocol(0.1))
    return Row(images, "open_vocabulary", prompts, "own", scores)


def made_up_further(benchmark: Benchmark) -> FurtherFigures:
    """Figures beside mIoU of rows whose prompts name absent classes."""
    draw, classes = np.random.default_rng(0), benchmark.classes
    histograms = draw.integers(0, 2, (40, len(classes)))
    scores = draw.random((3, len(classes), 40)) / 2 + histograms.T / 4
    presence = presence_figures(scores, histograms, classes)
    return FurtherFigures(boundary_iou=31.5, pointing=72.5, presence=presence)


def made_up_images(
    benchmark: Benchmark, count: int, size: tuple[int, int] = (480, 640), present: int = 6, seed: int = 0
) -> list[Shown]:
    """Images of smooth noise whose labels are cells around points; where it is dark the prediction is another class."""
    draw = np.random.default_rng(seed)
    accuracy, shown = draw.random(count) * 100, []
    for number, why in pictured(accuracy, np.ones((count, 2), np.int64), count):
        rough = draw.random((9, 9, 3))
        rows, columns = (np.linspace(0, 7.99, side) for side in size)
        image = (255 * _bilinear(rough, rows, columns) + draw.normal(0, 6, (*size, 3))).clip(0, 255).astype(np.uint8)
        classes = np.sort(draw.choice(len(benchmark.classes), min(present, len(benchmark.classes)), replace=False))
        labels = classes[_cells(len(classes), size, draw)].astype(np.uint8)
        predicted = np.where(image[..., 0] < 80, classes[0], labels).astype(np.int32)
        labels[:8] = 255
        scores = draw.random((len(classes), 32, 32)).astype(np.float32) * 0.01
        histogram = np.bincount(labels[8:].ravel(), minlength=len(benchmark.classes))
        pixels = np.zeros((16, 16, 3), np.float32)
        example = Example(number, f"{number:012d}", pixels, labels, histogram, tuple(classes.tolist()))
        shown.append(Shown(example, image, predicted, tuple(classes.tolist()), scores, float(accuracy[number]), why))
    return shown


def made_up_segments(
    benchmark: Benchmark, count: int, size: tuple[int, int] = (480, 640), present: int = 6, seed: int = 0
) -> list[ShownSegments]:
    """The same images in twice as many segments as classes, of which every other has one."""
    draw, found = np.random.default_rng(seed), []
    for one in made_up_images(benchmark, count, size, present, seed):
        segments = _cells(2 * len(one.classes), size, draw).astype(np.int32)
        owners = np.full(2 * len(one.classes), UNMATCHED)
        owners[::2] = one.classes
        found.append(ShownSegments(one.example, one.image, segments, owners, one.accuracy, one.why))
    return found


def _cells(count: int, size: tuple[int, int], draw: np.random.Generator) -> np.ndarray:
    """Which of some points is the nearest, for each pixel."""
    points = draw.random((count, 2)) * size
    grid = np.stack(np.meshgrid(*(np.arange(side) for side in size), indexing="ij"), axis=-1)
    return ((grid[:, :, None] - points) ** 2).sum(axis=-1).argmin(axis=-1)


def _bilinear(grid: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]
    upper = grid[top][:, left] * (1 - right) + grid[top][:, left + 1] * right
    lower = grid[top + 1][:, left] * (1 - right) + grid[top + 1][:, left + 1] * right
    return upper * (1 - down) + lower * down
