"""Figures 5, 6, 18, 31 and 32: pictures with one block's image-to-text attention blurred, and guided away from that."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from seg4diff_jax.analysis.paired_difference import paired_difference
from seg4diff_jax.analysis.perturbation_scores import score_sample
from seg4diff_jax.analysis.perturbed_pictures import perturbed_pictures, variants
from seg4diff_jax.images import read_image
from seg4diff_jax.interrupted_runs import DIRECTORY, write_whole
from seg4diff_jax.models.perturbation import Blur, Perturbation
from seg4diff_jax.reporting.overlays import contact_sheet
from seg4diff_jax.reporting.svg_plots import Series, line_plot
from seg4diff_jax.reproduction.parts import (
    ABOVE_ZERO,
    Claim,
    Measured,
    Part,
    Plot,
    Step,
    decided,
    decided_by,
    in_words,
)
from seg4diff_jax.reproduction.subject import GUIDANCE, STEPS, OnProgress, Subject

SCALE = 2.0
"""Of guidance away from the perturbed prediction. The paper's is not published."""
WAYS = {"blurred": None, "guided": SCALE}
SHOWN, CELL = 3, 160
PICTURES = "perturbed"
"""The folder of all pictures."""
Pictures = list[UInt8[np.ndarray, "height width 3"]]
SHEETS = {way: f"{way}.png" for way in WAYS}


def measure(subject: Subject, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Makes each prompt's picture with every block perturbed, and scores them against the unperturbed one.

    Pictures are kept as they are made, and those of an interrupted run are not made again. Scores have a row for each
    prompt: of the unperturbed picture, then of that with each block perturbed.
    """
    perturb, rows = Perturbation(tuple(subject.blocks), Blur()), variants(len(subject.prompts), (0,), subject.blocks)
    scores: dict[str, dict[str, list[list[float]]]] = {}
    (folder / PICTURES).mkdir(exist_ok=True)
    for number, (way, scale) in enumerate(WAYS.items()):
        file = lambda row, way=way: folder / PICTURES / f"{way}_{row.place:03}_{_name(row.block)}.png"
        done = [row for row in rows if file(row).is_file()]
        run = perturbed_pictures(
            subject.pipe,
            subject.prompts,
            perturb,
            scale=scale,
            batch=subject.batch_size,
            done=done,
            steps=STEPS,
            guidance=GUIDANCE,
        )
        for count, (row, picture) in enumerate(run, len(done) + 1):
            png = BytesIO()
            Image.fromarray(picture).save(png, "png")
            write_whole(folder / DIRECTORY, file(row), png.getvalue())
            on_progress((number + count / len(rows)) / len(WAYS))
        of_prompt = lambda place, file=file: [read_image(file(row)) for row in rows if row.place == place]
        _sheet(subject, [of_prompt(place) for place in range(min(SHOWN, len(subject.prompts)))], folder / SHEETS[way])
        if subject.scorers is not None:
            found = [score_sample(subject.scorers, of_prompt(i), prompt) for i, prompt in enumerate(subject.prompts)]
            scores[way] = {name: [sample[name].tolist() for sample in found] for name in found[0]}
    models = {} if subject.scorers is None else dict(subject.scorers.models)
    return {"prompts": len(subject.prompts), "scores": scores, "models": models}


def _name(block: int | None) -> str:
    return "base" if block is None else f"block_{block:02}"


def by_block(scores: Mapping[str, Mapping[str, Any]], way: str, name: str) -> Float[np.ndarray, "prompts blocks"]:
    """Returns a score of the pictures with each block perturbed, as 100 x cosine."""
    return 100 * np.asarray(scores[way][name])[:, 1:]


def unperturbed(scores: Mapping[str, Mapping[str, Any]]) -> Float[np.ndarray, " prompts"]:
    """Returns CLIP-T of the pictures without perturbation, as 100 x cosine."""
    return 100 * np.asarray(scores["blurred"]["CLIP-T"])[:, 0]


def _sheet(subject: Subject, pictures: list[Pictures], file: Path) -> None:
    """Draws the pictures of each prompt in a row, the unperturbed one first."""
    titles = ["unperturbed", *(f"block {block}" for block in subject.blocks)]
    cells = []
    for of_prompt in pictures:
        for title, picture in zip(titles, of_prompt, strict=True):
            image = Image.fromarray(picture)
            scale = CELL / max(image.size)
            size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
            cells.append((title, "", image.resize(size, Image.Resampling.LANCZOS)))
    contact_sheet(cells, longest=4000, columns=len(titles)).save(file)


def present(subject: Subject, measured: Mapping[str, Measured]) -> Part:
    found = measured[STEP.name]
    scores, plots = found["scores"], []
    for way, title in (("blurred", "perturbed"), ("guided", "guided away")):
        if not scores:
            break
        means = {name: by_block(scores, way, name).mean(axis=0) for name in scores[way]}
        lines = [Series([(value, 0.0) for value in each.tolist()]) for each in means.values()]
        caption, level = f"100 x cosine of pictures that are {title}, by block", float(unperturbed(scores).mean())
        drawn = line_plot(caption, subject.blocks, lines, horizontal="block", vertical="", level=level)
        legend = [(f"series{place}", name) for place, name in enumerate(means)]
        plots.append(Plot(caption, drawn, [*legend, ("level", "CLIP-T unperturbed")]))
    by = ", ".join(f"{name} by {model}" for name, model in found["models"].items()) or "no model scores them"
    shown = f"the first {min(SHOWN, found['prompts'])} prompts"
    return Part(
        "Perturbed blocks, and guidance away from them",
        f"Pictures of {found['prompts']} prompts, each block by itself: {STEPS} steps, guidance {GUIDANCE:g}, the "
        f"paper's blur (sigma 9, 5 taps) and guidance away from it by {SCALE:g}. Edges repeated, both halves, all "
        "steps, and that scale are ours: the paper states none of them. Scores against the unperturbed picture "
        f"(CLIP-I, DINO) and the prompt (CLIP-T): {by}.",
        _claims(subject, found),
        plots,
        pictures=[
            (f"Each block's image-to-text attention blurred, {shown}", SHEETS["blurred"]),
            (f"Guided away from each block's blur, {shown}", SHEETS["guided"]),
        ],
    )


def _claims(subject: Subject, found: Measured) -> list[Claim]:
    lowest = (
        ("Fig. 5, 18", "Perturbing the expert block harms the picture most.", "CLIP-I"),
        ("Fig. 5, 31", "Then the picture no longer fits the prompt.", "CLIP-T"),
    )
    claims = [_lowest(*each, found, subject.expert) for each in lowest]
    where, paper = "Fig. 6, 32", "Guidance away from the expert's perturbed prediction improves pictures."
    scores = found["scores"]
    if not scores:
        return [*claims, Claim(where, paper, ABOVE_ZERO, "no model scores pictures here", decided(None))]
    guided = by_block(scores, "guided", "CLIP-T")[:, subject.expert]
    apart = paired_difference(unperturbed(scores), guided, np.arange(len(guided)))
    return [*claims, Claim(where, paper, ABOVE_ZERO, f"CLIP-T {in_words(apart)}", decided_by(apart, len(guided)))]


def _lowest(where: str, paper: str, name: str, found: Measured, expert: int) -> Claim:
    rule = f"{name} is lower for the expert than for any other block; the interval to the lowest of these excludes 0."
    if not found["scores"]:
        return Claim(where, paper, rule, "no model scores pictures here", decided(None))
    values = by_block(found["scores"], "blurred", name)
    means = values.mean(axis=0)
    others = np.delete(np.arange(len(means)), expert)
    rival = int(others[means[others].argmin()])
    apart = paired_difference(values[:, expert], values[:, rival], np.arange(len(values)))
    figures = f"expert {means[expert]:.1f}, lowest of the others block {rival}, {means[rival]:.1f}: {in_words(apart)}"
    return Claim(where, paper, rule, figures, decided_by(apart, len(values)))


STEP = Step("perturbation", "perturbed and guided pictures", measure, present, tuple(SHEETS.values()))
