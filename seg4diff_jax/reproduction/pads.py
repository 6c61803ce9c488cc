"""Table 2 and figure 9b: segments without names, from the attention to an empty prompt's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seg4diff_jax.analysis.word_views import HEADS_AVERAGED, of_pads, seen_in_image
from seg4diff_jax.evaluation.measurement import Settings
from seg4diff_jax.evaluation.rows import ONE_SEGMENT
from seg4diff_jax.evaluation.run import evaluate
from seg4diff_jax.reporting.drawings import draw_maps
from seg4diff_jax.reproduction.parts import Claim, Measured, Part, Step, Table, decided
from seg4diff_jax.reproduction.subject import OnProgress, Subject
from seg4diff_jax.segmentation.unsupervised_scores import UNSUPERVISED_PROTOCOLS

SHEET = "pads.png"
SHOWN = 12


def measure(subject: Subject, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Measures the expert block at the checkpoint's own noise level, and draws the first tokens' maps."""
    pipe, images = subject.pipe, len(subject.benchmark.source)
    settings = Settings(
        (subject.expert,),
        (pipe.expert_step,),
        subject.seeds[:1],
        min(subject.batch_size, images),
        prompts=(),
        unsupervised=(UNSUPERVISED_PROTOCOLS["ours"],),
    )
    found = evaluate(pipe, subject.benchmark, settings, on_progress=lambda done, _: on_progress(done / images))
    image = subject.benchmark.source[0]["image"]
    blocks, levels = (subject.expert,), (pipe.expert_step,)
    seen = seen_in_image(pipe, image, "", HEADS_AVERAGED, blocks=blocks, levels=levels)
    views = of_pads(seen.records[subject.expert])[:SHOWN]
    draw_maps(image, views).save(folder / SHEET)
    return {
        "images": images,
        "miou": found.rows[0].metrics.miou,
        "segments": found.rows[0].segments,
        "guessers": {row.baseline: row.metrics.miou for row in found.baselines},
    }


def present(subject: Subject, measured: Mapping[str, Measured]) -> Part:
    found = measured[STEP.name]
    guessers = {name: value for name, value in found["guessers"].items() if value is not None}
    one = guessers[ONE_SEGMENT]
    rows = [("merged maps of the expert", [f"{found['miou']:.1f}", f"{found['segments']:.1f}"])]
    rows += [(f"guesser: {name.replace('_', ' ')}", [f"{value:.1f}", ""]) for name, value in guessers.items()]
    return Part(
        "Segments without names",
        f"{found['images']} images under an empty prompt. The maps of its start, end and pad tokens are merged by "
        "their divergence, and segments are matched to the true classes image by image.",
        [
            Claim(
                "Table 2, Fig. 9b",
                "The tokens of an empty prompt take coherent regions, which segment without names.",
                "mIoU is at least 1.5 times that of taking each image as one segment.",
                f"{found['miou']:.1f} %, as one segment {one:.1f} %",
                decided(found["miou"] >= 1.5 * one),
            )
        ],
        tables=[Table("Without names", ["mIoU, %", "segments an image"], rows, 0)],
        pictures=[("Where the first tokens of an empty prompt are read in the expert block", SHEET)],
    )


STEP = Step("pads", "segments without names", measure, present, (SHEET,))
