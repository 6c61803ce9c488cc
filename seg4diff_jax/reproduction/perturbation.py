"""Figures 5, 6, 18, 31 and 32: pictures with one block's image-to-text attention blurred, and guided away from that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from seg4diff_jax.analysis.paired_difference import paired_difference
from seg4diff_jax.analysis.perturbed_pictures import perturbed_pictures
from seg4diff_jax.models.perturbation import Blur, Perturbation
from seg4diff_jax.reporting.overlays import contact_sheet
from seg4diff_jax.reporting.svg_plots import Series, line_plot
from seg4diff_jax.reproduction.parts import Claim, Measured, Part, Plot, Step, decided
from seg4diff_jax.reproduction.subject import GUIDANCE, STEPS, OnProgress, Subject

SCALE = 2.0
"""Of guidance away from the perturbed prediction. The paper's is not published."""
WAYS = {"blurred": None, "guided": SCALE}
SHOWN, CELL = 3, 160
Pictures = list[UInt8[np.ndarray, "height width 3"]]


def measure(subject: Subject, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Makes each prompt's picture with every block perturbed, and scores them against the unperturbed one.

    Scores are means over prompts, by block; of the pictures without perturbation their fit to the prompts.
    """
    count, scores, differences = len(subject.blocks) + 1, {}, []
    total = len(WAYS) * count * len(subject.prompts)
    options: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE}
    for number, (way, scale) in enumerate(WAYS.items()):
        made: dict[int | None, Pictures] = {}
        perturb = Perturbation(tuple(subject.blocks), Blur())
        run = perturbed_pictures(
            subject.pipe, subject.prompts, perturb, scale=scale, batch=subject.batch_size, **options
        )
        for place, (variant, picture) in enumerate(run):
            made.setdefault(variant.block, []).append(picture)
            on_progress((number * total / len(WAYS) + place + 1) / total)
        base = made.pop(None)
        _sheet(subject, base, made).save(folder / f"{way}.png")
        if subject.scorers is None:
            continue
        for block in subject.blocks:
            for name, values in subject.scorers.scores(made[block], base, subject.prompts).items():
                scores.setdefault(name, {}).setdefault(way, []).append(float(values.mean()))
        plain = subject.scorers.scores(base, base, subject.prompts)["CLIP-T"]
        scores["CLIP-T"]["base"] = float(plain.mean())
        if scale is not None:
            for block in subject.blocks:
                own = subject.scorers.scores(made[block], base, subject.prompts)["CLIP-T"]
                found = paired_difference(100.0 * plain, 100.0 * own, np.arange(len(own)))
                differences.append([found.mean, found.low, found.high])
    models = {} if subject.scorers is None else dict(subject.scorers.models)
    return {"prompts": len(subject.prompts), "scores": scores, "differences": differences, "models": models}


def _sheet(subject: Subject, base: Pictures, made: Mapping[int | None, Pictures]) -> Image.Image:
    cells = []
    for place in range(min(SHOWN, len(base))):
        row = [("unperturbed", base[place]), *((f"block {block}", made[block][place]) for block in subject.blocks)]
        for title, picture in row:
            image = Image.fromarray(picture)
            scale = CELL / max(image.size)
            size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
            cells.append((title, "", image.resize(size, Image.Resampling.LANCZOS)))
    return contact_sheet(cells, longest=4000, columns=len(subject.blocks) + 1)


def present(subject: Subject, measured: Mapping[str, Measured]) -> Part:
    found = measured[STEP.name]
    scores, plots = found["scores"], []
    for way, title in (("blurred", "perturbed"), ("guided", "guided away")):
        names = [name for name in scores if way in scores[name]]
        lines = [Series([(100 * value, 0.0) for value in scores[name][way]]) for name in names]
        if names:
            caption = f"100 x cosine of pictures that are {title}, by block"
            level = 100 * scores["CLIP-T"]["base"]
            drawn = line_plot(caption, subject.blocks, lines, horizontal="block", vertical="", level=level)
            legend = [(f"series{place}", name) for place, name in enumerate(names)]
            plots.append(Plot(caption, drawn, [*legend, ("level", "CLIP-T unperturbed")]))
    by = ", ".join(f"{name} by {model}" for name, model in found["models"].items()) or "no model scores them"
    shown = f"the first {min(SHOWN, found['prompts'])} prompts"
    return Part(
        "Perturbed blocks, and guidance away from them",
        f"Pictures of {found['prompts']} prompts, each block by itself: {STEPS} steps, guidance {GUIDANCE:g}, the "
        f"paper's blur of both halves in all steps (sigma 9, 5 taps, edges repeated), and guidance away from it by "
        f"{SCALE:g}. "
        f"Scores against the unperturbed picture (CLIP-I, DINO) and the prompt (CLIP-T): {by}.",
        _claims(subject, found),
        plots,
        pictures=[
            (f"Each block's image-to-text attention blurred, {shown}", "blurred.png"),
            (f"Guided away from each block's blur, {shown}", "guided.png"),
        ],
    )


def _claims(subject: Subject, found: Measured) -> list[Claim]:
    scores, expert = found["scores"], subject.expert
    of = lambda name: np.asarray(scores[name]["blurred"]) if name in scores else None
    return [
        _lowest("Fig. 5, 18", "Perturbing the expert block harms the picture most.", "CLIP-I", of("CLIP-I"), expert),
        _lowest("Fig. 5, 31", "Then the picture no longer fits the prompt.", "CLIP-T", of("CLIP-T"), expert),
        _improves(found["differences"], expert),
    ]


def _lowest(where: str, paper: str, name: str, values: Float[np.ndarray, " blocks"] | None, expert: int) -> Claim:
    rule = f"{name} is lowest for the expert block."
    if values is None:
        return Claim(where, paper, rule, "no model scores pictures here", "not testable here")
    lowest, percent = int(values.argmin()), 100 * values
    found = f"lowest for block {lowest} ({percent[lowest]:.1f}); the expert, block {expert}: {percent[expert]:.1f}"
    return Claim(where, paper, rule, found, decided(lowest == expert))


def _improves(differences: list[list[float]], expert: int) -> Claim:
    where, paper = "Fig. 6, 32", "Guidance away from the expert's perturbed prediction improves pictures."
    rule = "The paired difference of 100 x CLIP-T is above 0, and its 95 % interval excludes 0."
    if not differences:
        return Claim(where, paper, rule, "no model scores pictures here", "not testable here")
    mean, low, high = differences[expert]
    found = f"{mean:+.2f}, interval {low:+.2f} to {high:+.2f}"
    return Claim(where, paper, rule, found, decided(None if low <= 0 <= high else mean > 0))


STEP = Step("perturbation", "perturbed and guided pictures", measure, present)
