"""Figures 3 and 29: do the principal components of a block's queries and keys follow positions, or objects?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from seg4diff_jax.analysis.principal_components import block_components
from seg4diff_jax.analysis.prompt_statistics import noised_squares
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.reporting.component_sheet import component_sheet
from seg4diff_jax.reporting.svg_plots import Series, line_plot
from seg4diff_jax.reproduction.parts import Claim, Measured, Part, Plot, Step, decided
from seg4diff_jax.reproduction.subject import OnProgress, Subject
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.text import Tokenizers, class_prompts

IMAGES, SHEET = 16, "components.png"
QUERIES_AND_KEYS = slice(0, 2)
TITLE = "Principal components of queries and keys"
PICTURE = ("Components of the first image as red, green and blue, by block", SHEET)


def measure(subject: Subject, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Measures on labelled images, noised, under the names of their classes. Returns parts of variance by block."""
    pipe, explained, first = subject.pipe, [], True
    items = labelled_items(subject.benchmark, pipe.tokenizers, IMAGES)
    for place, item in enumerate(items):
        images = noised_squares(pipe, [item["image"]], first=place)
        grid = images.grid(pipe.transformer.config.patch_size)
        labels = at_tokens(item["labels"], grid)
        several = len(np.unique(labels[labels != IGNORED])) > 1
        if not several and not first:
            continue
        with pipe.settings():
            found = block_components(pipe.transformer, images, pipe.encode_prompts([item["prompt"]]))
        scores = np.asarray(found.scores)[0]
        if first:
            component_sheet(scores, grid, subject.blocks).save(folder / SHEET)
            first = False
        if several:
            parts = [block[QUERIES_AND_KEYS] for block in scores]
            explained.append([(of_labels(part, labels), of_positions(part, grid, labels)) for part in parts])
        on_progress((place + 1) / len(items))
    objects, positions = np.mean(explained, axis=0).T.tolist() if explained else ([], [])
    return {"images": len(explained), "objects": objects, "positions": positions}


def labelled_items(benchmark: Benchmark, tokenizers: Tokenizers, count: int) -> list[dict[str, Any]]:
    """Returns the first images with their labels and the prompt of their classes. Those that need two are left out."""
    classes, source, found = benchmark.prompts, benchmark.source, []
    for place in range(len(source)):
        item = source[place]
        present = [classes[number] for number in np.unique(item["labels"]) if number < len(classes)]
        prompts = class_prompts(tokenizers, present).prompts if present else ()
        if len(prompts) == 1:
            found.append({"image": item["image"], "labels": item["labels"], "prompt": prompts[0]})
        if len(found) == count:
            break
    return found


def at_tokens(labels: Integer[np.ndarray, "height width"], grid: tuple[int, int]) -> Integer[np.ndarray, " tokens"]:
    """Returns the label in the middle of each image token's patch."""
    rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int) for n, side in zip(grid, labels.shape, strict=True))
    return labels[np.ix_(rows, columns)].ravel()


def of_labels(scores: Float[np.ndarray, "*lead tokens components"], labels: Integer[np.ndarray, " tokens"]) -> float:
    """Returns the part of the scores' variance that lies between the means of labels, 0 to 1, without void."""
    known = labels != IGNORED
    members = np.eye(256)[labels[known]][:, np.unique(labels[known])]
    return _explained(scores[..., known, :].astype(np.float64), members)


def of_positions(
    scores: Float[np.ndarray, "*lead tokens components"], grid: tuple[int, int], labels: Integer[np.ndarray, " tokens"]
) -> float:
    """Returns the part of the scores' variance that a quadratic function of row and column explains, 0 to 1.

    Tokens are those of `of_labels`, so that both are parts of the same variance.
    """
    known = labels != IGNORED
    rows, columns = (axis.ravel() for axis in np.meshgrid(*(np.linspace(-1, 1, n) for n in grid), indexing="ij"))
    terms = [np.ones_like(rows), rows, columns, rows * columns, rows**2, columns**2]
    return _explained(scores[..., known, :].astype(np.float64), np.stack(terms, axis=1)[known])


def _explained(
    scores: Float[np.ndarray, "*lead tokens components"], predictors: Float[np.ndarray, "tokens terms"]
) -> float:
    """Returns the part of the variance that least squares on the predictors explains, over all components together."""
    flat = np.moveaxis(scores, -2, 0).reshape(scores.shape[-2], -1)
    centred = flat - flat.mean(axis=0)
    fitted = predictors @ np.linalg.lstsq(predictors, centred, rcond=None)[0]
    return float(1 - np.square(centred - fitted).sum() / np.square(centred).sum())


def present(subject: Subject, measured: Mapping[str, Measured]) -> Part:
    found = measured[STEP.name]
    if not found["images"]:
        paper, rule = "Some blocks, the expert above all, show objects.", "Images show several classes."
        claim = Claim("Fig. 3", paper, rule, "no image does, of whose tokens any are labelled", decided(None))
        return Part(TITLE, "No image shows several labelled classes.", [claim], pictures=[PICTURE])
    objects, positions = np.asarray(found["objects"]), np.asarray(found["positions"])
    series = [Series([(100 * value, 0.0) for value in each]) for each in (objects, positions)]
    caption = "Variance of three components of queries and keys, by what explains it"
    drawn = line_plot(caption, subject.blocks, series, horizontal="block", vertical="%")
    mostly = int((positions > objects).sum())
    best = int(objects.argmax())
    return Part(
        TITLE,
        f"Of {found['images']} noised images of several classes: the part of the three components' variance that lies "
        "between classes of the label map, and the part that a quadratic function of row and column explains. The "
        "paper shows pictures only; these measures are ours.",
        [
            Claim(
                "Fig. 3",
                "Most blocks show positions.",
                "In more than half of the blocks positions explain more than classes do.",
                f"{mostly} of {len(objects)} blocks",
                decided(mostly > len(objects) / 2),
            ),
            Claim(
                "Fig. 3",
                "Some blocks, the expert above all, show objects.",
                "Classes explain most in the expert block.",
                f"most in block {best} ({100 * objects[best]:.0f} %); the expert, block {subject.expert}: "
                f"{100 * objects[subject.expert]:.0f} %",
                decided(best == subject.expert),
            ),
        ],
        [Plot(caption, drawn, [("series0", "classes"), ("series1", "positions")])],
        pictures=[PICTURE],
    )


STEP = Step("components", "principal components", measure, present, (SHEET,))
