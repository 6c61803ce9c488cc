"""Images of an evaluation for its page: each with its truth, what was predicted, where words were seen, a legend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Integer
from PIL import Image

from seg4diff_jax.reporting.colors import class_colors, hexadecimal, neutral_colors
from seg4diff_jax.reporting.inline_pictures import IGNORED_COLOR, Picture, drawing, photograph
from seg4diff_jax.reporting.overlays import heat_picture, percent

if TYPE_CHECKING:
    from seg4diff_jax.evaluation.gallery import Shown, ShownSegments

LONGEST, HEAT_LONGEST = 320, 168
"""Pixels along the longer side of a picture, and of a heat map."""
NOT_THERE = "not in the truth"
MOST_HEAT, MOST_NAMED, MOST_GREYS = 12, 16, 12
"""Heat maps and names of classes beside one image: of the classes that fill most of it; greys in its legend."""


@dataclass(frozen=True)
class LegendEntry:
    """What has a colour in one image, or several. `iou`: percent, None where the image has none of it to be found."""

    name: str
    colors: tuple[str, ...]
    iou: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class Card:
    """One image.

    Attributes:
      accuracy: percent of the labelled pixels that are right.
      as_drawn: the same of the picture, where what is scored is not what is drawn.
      unnamed: how many classes more than the legend has.
    """

    name: str
    why: str
    accuracy: float
    as_drawn: float | None
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
        drawing("prediction" if shown.papers is None else "refined masks", shown.predicted, colors, LONGEST),
    ]
    if shown.papers is not None:
        pictures.insert(2, drawing("the paper's masks", shown.papers, colors, LONGEST))
    scores = dict(zip(shown.classes, shown.scores, strict=True))
    filled = _by_size([*shown.classes], truth, shown.predicted)
    heat = [
        photograph(classes[index], heat_picture(shown.image, scores[index], HEAT_LONGEST), HEAT_LONGEST)
        for index in filled[:MOST_HEAT]
    ]
    names = {*shown.classes, *_present(truth, len(classes))}
    legend, unnamed = _legend(names, truth, shown.predicted, classes)
    return Card(shown.example.name, shown.why, shown.accuracy, None, pictures, heat, legend, unnamed)


def segments_card(shown: ShownSegments, classes: Sequence[str], *, by_rows: bool) -> Card:
    """The same of segments without names: matched ones in the colour of their class, others in greys.

    Args:
      by_rows: each row of pixels was matched by itself, whereas colours are those of a match of the whole image.
    """
    truth, count = shown.example.labels, len(classes)
    owners = shown.owners[shown.segments]
    matched = owners >= 0
    names = {*_present(truth, count), *np.unique(owners[matched]).tolist()}
    legend, unnamed = _legend(names, truth, np.where(matched, owners, count), classes)
    colors = class_colors(count)
    left, places, sizes = np.unique(shown.segments[~matched], return_inverse=True, return_counts=True)
    order = np.argsort(-sizes, kind="stable")  # the largest get the greys that are farthest apart
    greys = neutral_colors(len(left), np.array([IGNORED_COLOR, *colors[sorted(names)]], np.uint8))
    drawn = owners.copy()
    drawn[~matched] = count + np.argsort(order)[places]
    if len(left):
        name = f"{len(left)} segments without a class" if len(left) > 1 else "a segment without a class"
        swatches = tuple(hexadecimal(grey) for grey in greys[:MOST_GREYS])
        legend.append(LegendEntry(name, swatches, remark=f"{percent(float((~matched).mean()))} of the image"))
    pictures = [
        photograph("image", Image.fromarray(shown.image), LONGEST),
        drawing("truth", truth, colors, LONGEST),
        drawing("segments", drawn, np.concatenate([colors, greys]), LONGEST),
    ]
    as_drawn = _accuracy(truth, owners, count) if by_rows else None
    return Card(shown.example.name, shown.why, shown.accuracy, as_drawn, pictures, [], legend, unnamed)


def _present(truth: Integer[np.ndarray, "height width"], classes: int) -> list[int]:
    return np.unique(truth[truth < classes]).tolist()


def _legend(
    names: Iterable[int],
    truth: Integer[np.ndarray, "height width"],
    predicted: Int[np.ndarray, "height width"],
    classes: Sequence[str],
) -> tuple[list[LegendEntry], int]:
    """The largest of the classes that are named and what is not labelled; and how many classes more there are."""
    names, colors = sorted(names), class_colors(len(classes))
    legend = [
        LegendEntry(
            classes[index],
            (hexadecimal(colors[index]),),
            iou := _iou(index, truth, predicted, len(classes)),
            "" if iou is not None else NOT_THERE,
        )
        for index in _by_size(names, truth, predicted)[:MOST_NAMED]
    ]
    unnamed = len(names) - len(legend)
    if (truth >= len(classes)).any():
        legend.append(LegendEntry("not labelled", (hexadecimal(IGNORED_COLOR),)))
    return legend, unnamed


def _by_size(
    labels: Sequence[int], truth: Integer[np.ndarray, "height width"], predicted: Int[np.ndarray, "height width"]
) -> list[int]:
    """Those first that fill most of the image, in truth or in the prediction."""
    size = lambda label: max(np.count_nonzero(truth == label), np.count_nonzero(predicted == label))
    return sorted(labels, key=size, reverse=True)


def _accuracy(
    truth: Integer[np.ndarray, "height width"], predicted: Int[np.ndarray, "height width"], classes: int
) -> float:
    labelled = truth < classes
    return 100 * np.count_nonzero((predicted == truth) & labelled) / np.count_nonzero(labelled)


def _iou(
    label: int, truth: Integer[np.ndarray, "height width"], predicted: Int[np.ndarray, "height width"], classes: int
) -> float | None:
    counts = truth < classes
    is_it, said = truth == label, (predicted == label) & counts
    return 100 * np.count_nonzero(is_it & said) / np.count_nonzero(is_it | said) if is_it.any() else None
