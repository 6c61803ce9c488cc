"""Rows of results: the scores of one way to read masks off a model, or of one guesser, and how rows are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from seg4diff_jax.evaluation.further_figures import FurtherFigures
from seg4diff_jax.evaluation.options import Decoys, Threshold, shown_threshold
from seg4diff_jax.evaluation.paper_figures import Figure
from seg4diff_jax.evaluation.percent import Percent
from seg4diff_jax.evaluation.readouts import Readout
from seg4diff_jax.evaluation.wording import NO_WORDS, Words
from seg4diff_jax.segmentation.unsupervised_scores import UnsupervisedProtocol

ONE_SEGMENT = "one_segment"

BASELINES = {
    "random": "random classes (chance)",
    "constant": "one class everywhere",
    "permuted": "positions permuted",
    ONE_SEGMENT: "each image one segment",
}
"""The title of each guesser."""


class Setting(NamedTuple):
    """What rows of several seeds have in common.

    Attributes:
      prompts: the kind of prompts.
      threshold: segments without names: maps of a smaller divergence were merged. With names: pixels whose scores are
        all smaller, or that are below the mean of their map, are background.
      head: None is the mean of all heads.
      refined: whether masks were fused and refined.
    """

    block: int
    step: int
    prompts: str
    threshold: Threshold | None = None
    head: int | None = None
    refined: bool = False

    @property
    def readout(self) -> Readout:
        return Readout(self.block, self.head, self.refined)

    @property
    def reading(self) -> tuple[Readout, Threshold | None]:
        """Where attention is read, and the threshold of the background."""
        return self.readout, self.threshold

    @property
    def title(self) -> str:
        head = "" if self.head is None else f", head {self.head}"
        merged = "" if self.threshold is None else f", threshold {shown_threshold(self.threshold)}"
        refined = ", refined" if self.refined else ""
        return f"block {self.block}{head}, noise level {self.step}{merged}{refined}"


@dataclass(frozen=True)
class ScoredImages:
    """The images that rows are about.

    Attributes:
      dataset, split, labels: the benchmark, the part of it, and the kind of its labels.
      background, unlabelled: how the background and pixels without a label are scored.
      list: the file that names the images, where one was given.
      resize: how images come to the size that the model sees.
      lora: the adapters on the model.
      images, pixels: how many were scored.
      cut_off: labelled pixels that the model does not see.
      skipped, unlabelled_images: images that could not be read, and those without a labelled pixel.
    """

    dataset: str
    split: str | None
    labels: str | None
    background: str | None
    unlabelled: str | None
    list: str | None
    resize: str
    lora: str | None
    images: int
    pixels: int
    cut_off: int
    skipped: int
    unlabelled_images: int


@dataclass(frozen=True)
class Metrics:
    """Scores in percent.

    Attributes:
      groups: the mean IoU of each of the benchmark's groups of classes, `things` and `stuffs` always among them.
      iou, accuracy: by class.
    """

    miou: Percent
    mean_accuracy: Percent
    pixel_accuracy: Percent
    groups: Mapping[str, Percent]
    iou: Mapping[str, Percent]
    accuracy: Mapping[str, Percent]


@dataclass(frozen=True)
class Row:
    """The scores of a model read in one way with one seed, or of one guesser.

    Attributes:
      protocol, prompts, names: what the model was asked, see `evaluation.options`.
      further: figures beside mIoU, where they were measured.
      decoys: which absent classes prompts named; None for prompts without a chosen few.
      block, head, step, seed: None where a guesser reads no attention, or has no seed.
      refined: whether masks were fused and refined; how, says the run's configuration.
      words: what prompts say beside, or instead of, the classes' own names.
      below: pixels whose scores are all below it are background; None where no threshold finds the background, `mean`
        where it is the mean of each map.
      merging: how segments without names are made; None with names.
      segments: how many an image has on average, without names.
      seconds, images_per_second: of one pass over the images; None for guessers.
      reported: the paper's figures for just this.
      baseline: the guesser, one of `BASELINES`; None for the model.
      choice: the order by which `constant` chooses its class.
    """

    images: ScoredImages
    protocol: str
    prompts: str
    names: str | None
    metrics: Metrics
    further: FurtherFigures = field(default_factory=FurtherFigures)
    decoys: Decoys | None = None
    block: int | None = None
    head: int | None = None
    step: int | None = None
    seed: int | None = None
    refined: bool = False
    words: Words = NO_WORDS
    below: Threshold | None = None
    merging: UnsupervisedProtocol | None = None
    segments: float | None = None
    seconds: float | None = None
    images_per_second: float | None = None
    reported: tuple[Figure, ...] = ()
    baseline: str | None = None
    choice: str | None = None

    @property
    def threshold(self) -> Threshold | None:
        """Of merging, or of the background. None of `one_segment`, which is the same for any."""
        if self.merging is None:
            return self.below
        return None if self.baseline == ONE_SEGMENT else self.merging.threshold

    @property
    def setting(self) -> Setting:
        """Raises ValueError for a guesser that reads no attention."""
        if self.block is None or self.step is None:
            raise ValueError(f"{self.baseline} reads no block at no noise level")
        return Setting(self.block, self.step, self.prompts, self.threshold, self.head, self.refined)

    @property
    def figures(self) -> dict[str, float | None]:
        """Each figure that tables show, by its name in `results.json`."""
        metrics = self.metrics
        means = {name: getattr(metrics, name) for name in ("miou", "mean_accuracy", "pixel_accuracy")}
        further = {"boundary_iou": self.further.boundary_iou, "pointing": self.further.pointing}
        further |= {"average_precision": self.further.average_precision}
        return {
            **means,
            **metrics.groups,
            **further,
            "segments": self.segments,
            "images_per_second": self.images_per_second,
        }

    def plain(self) -> dict[str, Any]:
        """The row as `results.json` has it."""
        asked: dict[str, Any] = {"protocol": self.protocol, "prompts": self.prompts, "names": self.names}
        if self.decoys:
            asked |= {"decoys": self.decoys.count, "decoys_seed": self.decoys.seed}
        merging = asdict(self.merging) if self.merging else self.words.plain()
        merging |= {"threshold": self.threshold}
        place = {"block": self.block, "head": self.head, "step": self.step, "seed": self.seed}
        place |= {"refined": True} if self.refined else {}
        if self.baseline:
            choice = {"choice": self.choice} if self.choice else {}
            place = {"baseline": self.baseline, **choice, **place}
        else:
            reported = [{"name": each.title, "miou": each.miou, "source": each.source} for each in self.reported]
            speed = {"seconds": self.seconds, "images_per_second": self.images_per_second}
            place = {**speed, **place, "reported": reported}
        segments = {} if self.segments is None else {"segments": self.segments}
        metrics = asdict(self.metrics)
        groups = metrics.pop("groups")
        by_class = {name: metrics.pop(name) for name in ("iou", "accuracy")}
        described = asdict(self.images) | asked | merging | place | segments
        return described | metrics | groups | self.further.plain() | by_class


def averaged(
    figures: Sequence[Mapping[str, float | None]], names: Sequence[str]
) -> dict[str, tuple[float, float] | None]:
    """Returns the mean over seeds of each named figure, and the standard deviation of a sample (0 for one seed).

    None for a figure that no row has.
    """
    found: dict[str, tuple[float, float] | None] = {}
    for name in names:
        values = [value for each in figures if (value := each.get(name)) is not None]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        found[name] = (float(np.mean(values)), spread) if values else None
    return found


def mean_figures(rows: Sequence[Row], names: Sequence[str]) -> dict[str, tuple[float, float] | None]:
    """`averaged` of rows' own figures."""
    return averaged([row.figures for row in rows], names)


def by_setting(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """Rows of one setting together, in the order in which they come: one for each seed."""
    settings: dict[Setting, list[Row]] = {}
    for row in rows:
        settings.setdefault(row.setting, []).append(row)
    return settings


def best_setting(rows: Sequence[Row]) -> Setting:
    """Returns the setting of the highest mean IoU, averaged over seeds, with the prompts of the first row.

    A setting that has no mean IoU at one of its seeds is not the best, unless no setting has.
    """
    known = lambda miou: miou if miou is not None and np.isfinite(miou) else -np.inf
    mean = lambda some: np.mean([known(row.metrics.miou) for row in some])
    settings = by_setting(rows)
    alike = [setting for setting in settings if setting.prompts == rows[0].prompts]
    return max(alike, key=lambda setting: mean(settings[setting]))


def guesses(baselines: Sequence[Row], best: Setting) -> dict[str, list[Row]]:
    """Rows of each baseline with the same prompts, one for each seed; of permuted maps those of the best readout."""
    named: dict[str, list[Row]] = {}
    for row in sorted(baselines, key=lambda row: row.baseline != "random"):
        alike = row.prompts == best.prompts and row.threshold in (None, best.threshold)
        if alike and (row.block is None or Readout(row.block, row.head, row.refined) == best.readout):
            named.setdefault(str(row.baseline), []).append(row)
    return named
