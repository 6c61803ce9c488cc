"""Scores of masks that are fused and refined, beside the paper's, on the miniature's scenes: what helps, what it costs.

    python benchmarks/better_masks.py                                   # the 500 test scenes, three seeds
    python benchmarks/better_masks.py --split validation --scenes 200 --seeds "[0]"

Each row is the paper's masks with one thing added, or the chosen masks (`configs/eval/miniature_best.yaml`) with one
thing left out or changed, winners and losers alike. mIoU is of the classes present, and of the whole vocabulary. Time
is the processor seconds from pixels to labels, over those of the paper's masks in the same batch: medians of runs that
take turns.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

import seg4diff_jax as s4d
from seg4diff_jax.class_priors import read_class_prior
from seg4diff_jax.evaluation.benchmarks import Benchmark, scenes_benchmark
from seg4diff_jax.evaluation.measurement import Settings
from seg4diff_jax.evaluation.run import evaluate
from seg4diff_jax.segmentation.class_prior import ClassPrior
from seg4diff_jax.segmentation.mask_options import MASKS_WITH_PRIOR, PAPERS_MASKS, REFINED_MASKS, MaskOptions

CHOSEN = replace(MASKS_WITH_PRIOR, reading="concepts", refine_heads=(0, 2, 3))
"""By mIoU on validation scenes. Head 1 of the miniature's expert block is the one that attends to words."""
BALANCED = replace(REFINED_MASKS, refine_heads=(0, 2, 3))
"""The best without a class prior."""
PRIOR = Path(__file__).parents[1] / "configs" / "eval" / "miniature_prior.json"
"""Of the miniature; of another model give --prior."""
ADDED: dict[str, MaskOptions] = {
    "the paper's masks": PAPERS_MASKS,
    "2 views": MaskOptions(views=2),
    "2 views, one mirrored": MaskOptions(views=2, mirrored=True),
    "4 views, two mirrored": MaskOptions(views=4, mirrored=True),
    "2 views, noise levels 2 and 3": MaskOptions(views=2, levels=(2, 3)),
    "concepts": MaskOptions(reading="concepts"),
    "concept outputs (ConceptAttention)": MaskOptions(reading="concept outputs"),
    "in parts of all words' attention": MaskOptions(normalize="content"),
    "each map from 0 to 1": MaskOptions(normalize="minmax"),
    "balance 0.3": MaskOptions(balance=0.3),
    "balance 1": MaskOptions(balance=1.0),
    "prior 0.4": MaskOptions(prior=0.4),
    "prior 1": MaskOptions(prior=1.0),
    "1 round": MaskOptions(rounds=1),
    "1 round, not sharpened": MaskOptions(rounds=1, sharpness=1.0),
    "1 round by block 2": MaskOptions(rounds=1, refine_block=2),
    "2 rounds by heads 0, 2, 3": MaskOptions(rounds=2, refine_heads=(0, 2, 3)),
    "edges by the guided filter": MaskOptions(edge_radius=1.0),
    "edges by PAMR, 10 rounds": MaskOptions(edge_rounds=10),
    "edges by PAMR, 1 round": MaskOptions(edge_rounds=1),
}
CHANGED: dict[str, MaskOptions] = {
    "chosen": CHOSEN,
    "chosen, by all heads (--refine --prior --concepts)": replace(CHOSEN, refine_heads=None),
    "chosen, words in the prompt": replace(CHOSEN, reading="prompt"),
    "chosen, balanced instead of divided by the prior": BALANCED,
    "the same by all heads (--refine)": REFINED_MASKS,
    "chosen, prior 0.3": replace(CHOSEN, prior=0.3),
    "chosen, prior 0.5": replace(CHOSEN, prior=0.5),
    "chosen, balanced too": replace(CHOSEN, balance=0.3),
    "chosen, 2 views": replace(CHOSEN, views=2),
    "chosen, 2 views, one mirrored": replace(CHOSEN, views=2, mirrored=True),
    "chosen, 4 views, two mirrored": replace(CHOSEN, views=4, mirrored=True),
    "chosen, without the prior": replace(CHOSEN, prior=0.0),
    "chosen, not refined": replace(CHOSEN, rounds=0, refine_heads=None),
    "chosen, 1 round": replace(CHOSEN, rounds=1),
    "chosen, 3 rounds": replace(CHOSEN, rounds=3),
    "chosen, without edges": replace(CHOSEN, edge_radius=0.0),
    "chosen, edges by PAMR": replace(CHOSEN, edge_radius=0.0, edge_rounds=10),
}
ROWS = ADDED | CHANGED


def main(
    model: str = "miniature",
    scenes: int = 500,
    split: str = "test",
    seeds: tuple[int, ...] = (0, 1, 2),
    rows: tuple[str, ...] = tuple(ROWS),
    lora: str | None = None,
    prior: Path = PRIOR,
    timed: int = 32,
    repeats: int = 5,
) -> None:
    """Measure.

    Args:
      model: miniature, or what else `load` takes.
      scenes: how many of the split's, from the first.
      split: train, validation or test.
      seeds: of the noise; mean and deviation are over them.
      rows: which of the table.
      lora: adapters on the model.
      prior: what seg4diff class-prior wrote.
      timed: images of the batch that is timed.
      repeats: runs of each row and of the paper's masks; 0: time nothing.
    """
    pipe = s4d.load(model, dtype="float32", lora=lora)
    benchmark = scenes_benchmark(scenes, pipe.trained_size, split)
    table = Table(title=f"{scenes} {split} scenes, {len(seeds)} seeds{f', {lora}' if lora else ''}")
    for column in ("", "classes present", "whole vocabulary", "time", "time, whole vocabulary"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    first: dict[str, float] = {}
    measured = read_class_prior(prior)
    given = lambda masks: measured if masks.prior else None
    for name in rows:
        masks = ROWS[name]
        found = {kind: mious(pipe, benchmark, masks, given(masks), seeds, kind) for kind in ("present", "all")}
        first = first or {kind: statistics.mean(each) for kind, each in found.items()}
        cells = [shown(each, first[kind]) for kind, each in found.items()]
        cells += [
            f"{ratio(pipe, benchmark, masks, given(masks), min(timed, scenes), repeats, kind):.2f} x"
            if repeats
            else "-"
            for kind in found
        ]
        table.add_row(name, *cells)
    Console(highlight=False, width=140).print(table)


def mious(
    pipe: s4d.Pipeline,
    benchmark: Benchmark,
    masks: MaskOptions,
    prior: ClassPrior | None,
    seeds: tuple[int, ...],
    kind: str,
) -> list[float]:
    """mIoU in percent, of each seed."""
    settings = Settings(
        (pipe.expert_block,), (pipe.expert_step,), seeds, batch_size=50, prompts=(kind,), masks=masks, prior=prior
    )
    rows = evaluate(pipe, benchmark, settings).rows  # the paper's masks are measured beside the refined ones
    return [float(row.metrics.miou or np.nan) for row in rows if row.refined == (masks != PAPERS_MASKS)]


def shown(each: list[float], first: float) -> str:
    mean = statistics.mean(each)
    spread = f" ± {statistics.stdev(each):.1f}" if len(each) > 1 else ""
    return f"{mean:.1f}{spread} ({mean - first:+.1f})"


def ratio(
    pipe: s4d.Pipeline,
    benchmark: Benchmark,
    masks: MaskOptions,
    prior: ClassPrior | None,
    images: int,
    repeats: int,
    kind: str,
) -> float:
    """Processor seconds of masks over those of the paper's, from pixels to labels."""
    items = [benchmark.source[index] for index in range(images)]
    present = [[benchmark.classes[label] for label in np.unique(item["labels"]) if label != 255] for item in items]
    asked = present if kind == "present" else [list(benchmark.classes)] * images
    pictures, seconds = [item["image"] for item in items], {masks: [], PAPERS_MASKS: []}
    for number in range(repeats + 1):
        for each in seconds:
            begun = time.process_time()
            pipe.segment(pictures, asked, masks=each, prior=prior if each == masks else None)
            if number:  # the first compiles
                seconds[each].append(time.process_time() - begun)
    return statistics.median(seconds[masks]) / statistics.median(seconds[PAPERS_MASKS])


if __name__ == "__main__":
    auto_cli(main)
