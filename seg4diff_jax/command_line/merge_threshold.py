"""`seg4diff merge-threshold DIR --model MODEL`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from seg4diff_jax.analysis.merge_threshold import (
    THRESHOLDS,
    at_thresholds,
    best_score,
    unsupervised_scores,
)
from seg4diff_jax.command_line.memory import TO_LOAD, full_memory_told
from seg4diff_jax.command_line.segment import load_shown, model_arguments, open_named
from seg4diff_jax.data.folder import LabelledFolder
from seg4diff_jax.evaluation.options import thresholds
from seg4diff_jax.flow import LARGEST_SEED, check_seed
from seg4diff_jax.segmentation.unsupervised_scores import PROTOCOLS
from seg4diff_jax.segmentation.unsupervised_tally import UnsupervisedScore


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("directory", type=str, help="labelled images to choose by: images/, labels/, classes.txt")
    grid = f"{THRESHOLDS[0]}..{THRESHOLDS[-1]}"
    add("--thresholds", type=str, help=f"as in 0.005,0.01; default: {len(THRESHOLDS)} of {grid}")
    add("--protocol", choices=list(PROTOCOLS), default="ours", help="how maps are normalised and segments matched")
    add("--batch-size", type=int, default=4, help="images that the device takes at a time")
    add("--block", type=int, help="transformer block to read; default: the checkpoint's own expert block")
    add("--step", type=int, help="noise level: 1 (nearly clean) to 28 (pure noise); default: the checkpoint's own")
    add("--seed", type=int, default=0, help=f"of the noise: 0 to {LARGEST_SEED}")
    model_arguments(parser)


def run(options: Any) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it warns that it has no PyTorch; none is needed
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    chosen = THRESHOLDS if options.thresholds is None else thresholds(options.thresholds, "--thresholds")
    protocols = at_thresholds(PROTOCOLS[options.protocol], chosen)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}: expected at least 1")
    check_seed(options.seed)
    checkpoint = open_named(options)
    block, step = checkpoint.block(options.block), checkpoint.step(options.step)
    folder = LabelledFolder(options.directory)
    pipe, _, _ = load_shown(console, checkpoint, options, blocks=block + 1)
    columns = TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar, full_memory_told(f"give a smaller --batch-size; or {TO_LOAD}"):
        task = bar.add_task("", total=len(folder))
        scores = unsupervised_scores(
            pipe,
            folder,
            len(folder.classes),
            protocols,
            block=block,
            step=step,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=lambda images: bar.update(task, completed=images),
        )
    Console(highlight=False).print(score_table(scores, len(folder)))


def score_table(scores: Sequence[UnsupervisedScore], images: int) -> Table:
    best = best_score(scores)
    table = Table("threshold", "mIoU", "pixel acc.", "segments", "", box=None)
    for column in table.columns[:4]:
        column.justify = "right"
    for score in scores:
        table.add_row(
            f"{score.protocol.threshold:g}",
            f"{100 * score.counts.mean_iou():.2f}",
            f"{100 * score.counts.pixel_accuracy():.2f}",
            f"{score.segments:.1f}",
            "best" if score is best else "",
            style="bold" if score is best else "",
        )
    table.caption = f"%, and segments in an image; over {images} images, which the best should not be reported on."
    return table
