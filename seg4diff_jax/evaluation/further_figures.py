"""Figures beside mIoU, from what was counted: how well maps tell which classes are in a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from seg4diff_jax.evaluation.percent import Percent, mean_percent, percent
from seg4diff_jax.segmentation.presence import SCORES, auc_of_each, best_threshold, held_out_f1, reliability


@dataclass(frozen=True)
class Bin:
    """Cases whose scores are alike: how many, their mean score, and how many of them are there, in percent."""

    cases: int
    score: Percent
    present: Percent


@dataclass(frozen=True)
class PresenceFigures:
    """How well one score of presence tells which of the classes asked for are in an image. In percent.

    Attributes:
      auc: how often an image with a class scores higher for it than one without; the mean over classes.
      auc_in_image: how often a class that an image has scores higher than one that it has not; the mean over images.
      f1: over all images and classes, each image decided at the threshold that is best for others.
      f1_of_all: the same if every class asked for is said to be there.
      threshold: the score from which on a class is best said to be there, over all images.
      calibration_error: how far scores, read as probabilities, are from how often a class is there.
      reliability: what that is the mean of, from the lowest scores to the highest.
      auc_by_class: None of a class that all images have, or none.
    """

    auc: Percent
    auc_in_image: Percent
    f1: Percent
    f1_of_all: Percent
    threshold: Percent
    calibration_error: Percent
    reliability: tuple[Bin, ...]
    auc_by_class: Mapping[str, Percent]


@dataclass(frozen=True)
class FurtherFigures:
    """Figures beside mIoU, in percent; None for what was not measured.

    Attributes:
      boundary_iou: the mean over classes of the IoU of bands along the edges of masks.
      pointing: the mean over classes of how often the highest point of a class's map lies on the class.
      average_precision: mAP, the mean over images; see `segmentation.average_precision`.
      boundary_iou_by_class, pointing_by_class: what they are means of.
      presence: by the score of presence, see `segmentation.presence.SCORES`.
    """

    boundary_iou: Percent = None
    pointing: Percent = None
    average_precision: Percent = None
    presence: Mapping[str, PresenceFigures] | None = None
    boundary_iou_by_class: Mapping[str, Percent] | None = None
    pointing_by_class: Mapping[str, Percent] | None = None

    def plain(self) -> dict[str, Any]:
        """What was measured, as `results.json` has it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def named(shares: Float[np.ndarray, " classes"], classes: tuple[str, ...]) -> dict[str, Percent]:
    """Shares of classes in percent, by name."""
    return dict(zip(classes, map(percent, shares.tolist()), strict=True))


def presence_figures(
    scores: Float[np.ndarray, "scores classes images"], histograms: np.ndarray, classes: tuple[str, ...]
) -> dict[str, PresenceFigures]:
    """Compares scores of presence with which classes have counted pixels.

    Args:
      scores: in the order of `SCORES`; NaN where a class was not asked for, or nobody says whether it is there.
      histograms: number of counted pixels of each class, [images, classes].
      classes: their names.
    """
    return {name: _figures(own.T, histograms > 0, classes) for name, own in zip(SCORES, scores, strict=True)}


def _figures(
    scores: Float[np.ndarray, "images classes"], present: Bool[np.ndarray, "images classes"], classes: tuple[str, ...]
) -> PresenceFigures:
    asked = ~np.isnan(scores)
    cases, there = scores[asked], present[asked]
    by_class, in_image = auc_of_each(scores.T, present.T), auc_of_each(scores, present)
    bins = reliability(cases, there)
    return PresenceFigures(
        auc=mean_percent(by_class),
        auc_in_image=mean_percent(in_image),
        f1=percent(held_out_f1(scores, present)),
        f1_of_all=percent(2 * there.sum() / (there.sum() + len(there))) if there.any() else None,
        threshold=percent(best_threshold(cases, there)),
        calibration_error=percent(bins.error),
        reliability=tuple(Bin(int(n), percent(score), percent(share)) for n, score, share in zip(*bins, strict=True)),
        auc_by_class=named(by_class, classes),
    )
