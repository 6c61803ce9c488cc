"""Figures 8, 15 and 17, Table 1: masks of every block, head and noise level, by names of some or all classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from seg4diff_jax.analysis.word_views import HEADS_KEPT, by_heads, seen_in_image
from seg4diff_jax.evaluation.measurement import Settings
from seg4diff_jax.evaluation.rows import Row
from seg4diff_jax.evaluation.run import evaluate
from seg4diff_jax.reporting.drawings import draw_maps
from seg4diff_jax.reporting.svg_plots import Series, heat_plot, line_plot
from seg4diff_jax.reproduction.components import labelled_items
from seg4diff_jax.reproduction.parts import Claim, Measured, Part, Plot, Step, Table, decided
from seg4diff_jax.reproduction.subject import OnProgress, Subject

SHEET = "heads.png"
KINDS = {"present": "classes that are there", "all": "the whole vocabulary"}
PAPER_LEVEL = 8


def measure(subject: Subject, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Measures every block, the mean of its heads and each of them, at every level, with one seed."""
    pipe, images = subject.pipe, len(subject.benchmark.source)
    heads = (None, *range(pipe.transformer.config.num_attention_heads))
    level = pipe.expert_step
    settings = Settings(
        tuple(subject.blocks),
        tuple(sorted({*subject.levels, level})),
        subject.seeds[:1],
        min(subject.batch_size, images),
        heads=heads,
        prompts=tuple(KINDS),
    )
    found = evaluate(pipe, subject.benchmark, settings, on_progress=lambda done, _: on_progress(done / images))
    (item,) = labelled_items(subject.benchmark, pipe.tokenizers, 1)
    name = item["prompt"].split(" ")[0]
    seen = seen_in_image(pipe, item["image"], item["prompt"], HEADS_KEPT, blocks=(subject.expert,), levels=(level,))
    views = by_heads(seen.records[subject.expert], name)
    draw_maps(item["image"], views).save(folder / SHEET)
    guessers = {row.baseline: row.metrics.miou for row in found.baselines if row.prompts == "present"}
    return {
        "images": images,
        "word": name,
        "data": subject.benchmark.name,
        "levels": list(settings.steps),
        "rows": [_plain(row) for row in found.rows],
        "guessers": {name: value for name, value in guessers.items() if name in ("random", "constant")},
    }


def _plain(row: Row) -> dict[str, Any]:
    scores = {"miou": row.metrics.miou, "macc": row.metrics.mean_accuracy, "pacc": row.metrics.pixel_accuracy}
    return {"prompts": row.prompts, "block": row.block, "head": row.head, "level": row.step, **scores}


def mean_ious(found: Measured, level: int, prompts: str = "present") -> Float[np.ndarray, " blocks"]:
    """Returns each block's mean IoU in percent, heads averaged."""
    return by_head(found, level, prompts)[:, 0]


def by_head(found: Measured, level: int, prompts: str = "present") -> Float[np.ndarray, "blocks readouts"]:
    """Returns the mean IoU in percent by block, first of the heads' mean, then of each head."""
    rows = [row for row in found["rows"] if (row["level"], row["prompts"]) == (level, prompts)]
    heads = [None, *sorted({row["head"] for row in rows} - {None})]
    value = {(row["block"], row["head"]): row["miou"] for row in rows}
    blocks = sorted({row["block"] for row in rows})
    return np.array(
        [[np.nan if value[block, head] is None else value[block, head] for head in heads] for block in blocks]
    )


def present(subject: Subject, measured: Mapping[str, Measured]) -> Part:
    found, level = measured[STEP.name], subject.pipe.expert_step
    blocks, levels, expert = subject.blocks, found["levels"], subject.expert
    of_kinds = {kind: mean_ious(found, level, kind) for kind in KINDS}
    best = int(np.nanargmax(of_kinds["present"]))
    by_block = "mIoU by block"
    marks = {"present": best, "all": None}
    lines = [Series([(value, 0.0) for value in each.tolist()], marks[kind]) for kind, each in of_kinds.items()]
    legend = [(f"series{place}", name) for place, name in enumerate(KINDS.values())]
    heads = by_head(found, level)
    grid = np.array([mean_ious(found, each) for each in levels])
    head_caption = f"mIoU of single heads, noise level {level}"
    level_caption = "mIoU by block and noise level"
    count, across = range(heads.shape[1] - 1), "block"
    plots = [
        Plot(by_block, line_plot(by_block, blocks, lines, vertical="%", horizontal=across), legend),
        Plot(head_caption, heat_plot(head_caption, heads[:, 1:].T, count, blocks, vertical="head", horizontal=across)),
        Plot(level_caption, heat_plot(level_caption, grid, levels, blocks, vertical="level", horizontal=across)),
    ]
    plots = [plot._replace(is_wide=len(blocks) > 12) for plot in plots]
    own = [row for row in found["rows"] if (row["block"], row["head"], row["level"]) == (expert, None, level)]
    figures = {row["prompts"]: [_percent(row[key]) for key in ("miou", "macc", "pacc")] for row in own}
    table = Table(
        f"The expert, block {expert}, noise level {level}",
        ["mIoU, %", "mACC, %", "pACC, %"],
        [(name, figures[kind]) for kind, name in KINDS.items()],
    )
    return Part(
        "Masks from one forward pass",
        f"{found['images']} images of {found['data']}, one seed of the noise. Asked for the classes that are there, "
        "the model is told what it is to find, as in the paper; asked for the whole vocabulary, it is not.",
        _claims(subject, found),
        plots,
        [table],
        [(f"The expert's map of the word {found['word']!r}: the mean of its heads, and each head", SHEET)],
    )


def _claims(subject: Subject, found: Measured) -> list[Claim]:
    level, expert, count = subject.pipe.expert_step, subject.expert, len(subject.blocks)
    blocks, heads = mean_ious(found, level), by_head(found, level)[:, 1:]
    best, last = int(np.nanargmax(blocks)), count - 1
    of_levels = {each: float(mean_ious(found, each)[expert]) for each in found["levels"]}
    best_level = max(of_levels, key=lambda each: of_levels[each])
    thirds = [float(np.nanmean(part)) for part in np.array_split(np.nanmax(heads, axis=1), 3)]
    guess = max(value for value in found["guessers"].values() if value is not None)
    return [
        Claim(
            "Table 1",
            "One block's attention segments zero-shot.",
            "The expert's mIoU is at least twice that of the best guesser (random classes, or one class everywhere).",
            f"{blocks[expert]:.1f} %, the guesser {guess:.1f} %",
            decided(blocks[expert] >= 2 * guess),
        ),
        Claim(
            "Fig. 8",
            "mIoU peaks in the middle, at the expert block.",
            "The best block is the expert, and neither the first nor the last.",
            f"best in block {best} ({blocks[best]:.1f} %); the expert, block {expert}: {blocks[expert]:.1f} %",
            decided(best == expert and 0 < best < last),
        ),
        Claim(
            "Fig. 17",
            "Heads of middle blocks segment better than early and late ones.",
            "The best heads of the middle third of the blocks have the highest mean.",
            "best heads' mean by third: " + ", ".join(f"{each:.1f}" for each in thirds) + " %",
            decided(thirds[1] > max(thirds[0], thirds[2])),
        ),
        Claim(
            "Fig. 9a",
            "Single heads take parts, and their mean the whole.",
            "In the expert block, the heads' mean has a higher mIoU than every single head.",
            f"mean {blocks[expert]:.1f} %, best head {np.nanmax(heads[expert]):.1f} %",
            decided(blocks[expert] > np.nanmax(heads[expert])),
        ),
        Claim(
            "Fig. 15",
            f"Noise level {PAPER_LEVEL} of 28 is the best.",
            f"Of the levels measured, the expert's mIoU is highest at {PAPER_LEVEL}.",
            f"best at level {best_level} ({of_levels[best_level]:.1f} %); at {PAPER_LEVEL}: "
            + (f"{of_levels[PAPER_LEVEL]:.1f} %" if PAPER_LEVEL in of_levels else "not measured"),
            decided(best_level == PAPER_LEVEL if PAPER_LEVEL in of_levels else None),
        ),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


STEP = Step("masks", "masks of every block, head and noise level", measure, present, (SHEET,))
