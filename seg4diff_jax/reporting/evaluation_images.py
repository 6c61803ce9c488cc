"""Images of an evaluation for its page: each with its truth, what was predicted, where words were seen, a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Integer
from PIL import Image

from seg4diff_jax.reporting.colors import class_colors, hexadecimal
from seg4diff_jax.reporting.inline_pictures import IGNORED_COLOR, Picture, drawing, photograph
from seg4diff_jax.reporting.overlays import heat_picture

if TYPE_CHECKING:
    from seg4diff_jax.evaluation.run import Shown

LONGEST, HEAT_LONGEST = 320, 168
"""Pixels along the longer side of a picture, and of a heat map."""
MOST_HEAT, MOST_NAMED = 12, 16
"""Heat maps and names of classes beside one image: of the classes that fill most of it."""


@dataclass(frozen=True)
class LegendEntry:
    """A class in one image. `iou`: percent, None where the image has none of it to be found."""

    name: str
    color: str
    iou: float | None


@dataclass(frozen=True)
class Card:
    """One image. `unnamed`: how many classes more than the legend has."""

    name: str
    why: str
    accuracy: float
    pictures: list[Picture]
    heat: list[Picture]
    legend: list[LegendEntry]
    unnamed: int


def card(shown: Shown, classes: Sequence[str]) -> Card:
    """What the page shows of an image; `classes` are the names of the whole vocabulary."""
    colors, truth = class_colors(len(classes)), shown.example.labels
    pictures = [
        photograph("image", Image.fromarray(shown.image), LONGEST),
        drawing("truth", truth, colors, LONGEST),
        drawing("prediction", shown.predicted, colors, LONGEST),
    ]
    scores = dict(zip(shown.classes, shown.scores, strict=True))
    filled = _by_size([*shown.classes], truth, shown.predicted)
    heat = [
        photograph(classes[index], heat_picture(shown.image, scores[index], HEAT_LONGEST), HEAT_LONGEST)
        for index in filled[:MOST_HEAT]
    ]
    names = sorted({*shown.classes, *np.unique(truth[truth < len(classes)]).tolist()})
    named = _by_size(names, truth, shown.predicted)[:MOST_NAMED]
    legend = [
        LegendEntry(classes[index], hexadecimal(colors[index]), _iou(index, truth, shown.predicted, len(classes)))
        for index in named
    ]
    if (truth >= len(classes)).any():
        legend.append(LegendEntry("not labelled", hexadecimal(IGNORED_COLOR), None))
    return Card(shown.example.name, shown.why, shown.accuracy, pictures, heat, legend, len(names) - len(named))


def _by_size(
    labels: Sequence[int], truth: Integer[np.ndarray, "height width"], predicted: Int[np.ndarray, "height width"]
) -> list[int]:
    """Those first that fill most of the image, in truth or in the prediction."""
    size = lambda label: max(np.count_nonzero(truth == label), np.count_nonzero(predicted == label))
    return sorted(labels, key=size, reverse=True)


def _iou(
    label: int, truth: Integer[np.ndarray, "height width"], predicted: Int[np.ndarray, "height width"], classes: int
) -> float | None:
    counts = truth < classes
    is_it, said = truth == label, (predicted == label) & counts
    return 100 * np.count_nonzero(is_it & said) / np.count_nonzero(is_it | said) if is_it.any() else None
