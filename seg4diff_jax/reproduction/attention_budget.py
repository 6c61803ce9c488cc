"""Figures 2 and 4: where each block's attention goes in generating runs, and the norms of its values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from seg4diff_jax.analysis.prompt_statistics import PromptStatistics, while_generating
from seg4diff_jax.analysis.summary import Summary, summarize
from seg4diff_jax.reporting.svg_plots import Series, line_plot
from seg4diff_jax.reproduction.parts import Claim, Measured, Part, Plot, Step, Table, decided
from seg4diff_jax.reproduction.subject import GUIDANCE, SHOWN_LEVELS, STEPS, OnProgress, Subject


def measure(subject: Subject, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Measures all blocks in the runs themselves, in the half that follows the prompt. Returns means over prompts."""
    found: dict[int, list[PromptStatistics]] = defaultdict(list)
    for places in subject.prompt_batches():
        prompts = [subject.prompts[place] for place in places]
        options: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "first": places.start}
        statistics, _ = while_generating(subject.pipe, prompts, at_steps=SHOWN_LEVELS, **options)
        for level, each in zip(SHOWN_LEVELS, statistics, strict=True):
            found[level].append(each)
        on_progress(places.stop / len(subject.prompts))
    return {"prompts": len(subject.prompts), "levels": {level: plain(summarize(each)) for level, each in found.items()}}


def plain(summary: Summary) -> dict[str, Any]:
    means = {name: spread.mean.tolist() for name, spread in summary.quantities.items()}
    return {
        "uniform": summary.uniform,
        "text": means["image to text"],
        "words": means["image to words"],
        "image": means["text to image"],
        "norms": {name: means[f"norm of {name}"] for name in ("image", "text", "words")},
    }


def present(subject: Subject, measured: Mapping[str, Measured]) -> Part:
    levels = {int(level): values for level, values in measured[STEP.name]["levels"].items()}
    legend = [(f"series{place}", f"noise level {level}") for place, level in enumerate(levels)]
    uniform = next(iter(levels.values()))["uniform"]
    lines = lambda key: [Series([(100 * value, 0.0) for value in values[key]]) for values in levels.values()]
    of_text = "Attention of image tokens on text, by block"
    of_image = "Attention of text tokens on the image, by block"
    plots = [
        Plot(
            of_text,
            line_plot(of_text, subject.blocks, lines("text"), horizontal="block", vertical="%", level=100 * uniform),
            [*legend, ("level", "without any preference")],
        ),
        Plot(
            of_image,
            line_plot(
                of_image, subject.blocks, lines("image"), horizontal="block", vertical="%", level=100 * (1 - uniform)
            ),
            [*legend, ("level", "without any preference")],
        ),
    ]
    tables = [_norms(subject, level, values) for level, values in levels.items()]
    return Part(
        "Attention and value norms of every block",
        f"Means over {measured[STEP.name]['prompts']} prompts, in the generating runs themselves: {STEPS} steps, "
        f"guidance {GUIDANCE:g}, the half that follows the prompt, all heads averaged. Text is CLIP's tokens and those "
        "of T5, or its zeros.",
        _claims(subject, levels),
        plots,
        tables,
    )


def _norms(subject: Subject, level: int, values: Measured) -> Table:
    names = {"image": "image tokens", "text": "all text tokens", "words": "the prompt's words"}
    rows = [(f"block {block}", [f"{values['norms'][name][block]:.2f}" for name in names]) for block in subject.blocks]
    return Table(f"Value norms, noise level {level}", [*names.values()], rows, subject.expert)


def ratios(values: Measured, name: str = "text") -> Float[np.ndarray, " blocks"]:
    """Returns the norms of some tokens' values as multiples of the image's, by block."""
    return np.asarray(values["norms"][name]) / np.asarray(values["norms"]["image"])


def _claims(subject: Subject, levels: Mapping[int, Measured]) -> list[Claim]:
    expert = subject.expert
    text = {level: float(np.median(values["text"])) / values["uniform"] for level, values in levels.items()}
    image = {level: float(np.median(values["image"])) for level, values in levels.items()}
    possible = min(1 / values["uniform"] for values in levels.values())  # all attention on text
    norms = {level: ratios(values) for level, values in levels.items()}
    words = {level: ratios(values, "words") for level, values in levels.items()}
    at = lambda figures: ", ".join(f"{figure} (level {level})" for level, figure in figures.items())
    return [
        Claim(
            "Fig. 2b",
            "Image tokens put far more attention on text than its share of the tokens.",
            "The median block's share is at least 1.5 times the uniform one, at both noise levels.",
            at({level: f"{each:.2f} times" for level, each in text.items()}),
            decided(None if possible < 1.5 else min(text.values()) >= 1.5),
        ),
        Claim(
            "Fig. 2c",
            "Text tokens mostly read text.",
            "The median block's text tokens put less than half of their attention on the image.",
            at({level: f"{100 * each:.0f} %" for level, each in image.items()}),
            decided(max(image.values()) < 0.5),
        ),
        Claim(
            "Fig. 4",
            "In the expert block, value norms of text are high against the image's.",
            "The expert's ratio is above the median block's, at both noise levels.",
            at({level: f"{each[expert]:.2f}, median {np.median(each):.2f}" for level, each in norms.items()}),
            decided(all(each[expert] > np.median(each) for each in norms.values())),
        ),
        Claim(
            "Fig. 4",
            "More so for the prompt's words than for all text.",
            "In the expert block, the words' norm is above that of all text, at both noise levels.",
            at({level: f"{each[expert]:.2f} for {norms[level][expert]:.2f}" for level, each in words.items()}),
            decided(all(each[expert] > norms[level][expert] for level, each in words.items())),
        ),
    ]


STEP = Step("attention_budget", "attention and value norms in generating runs", measure, present)
