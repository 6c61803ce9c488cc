"""What the paper (Seg4Diff, arXiv 2509.18096) reports of segmentation, figure by figure, as its tables print it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from seg4diff_jax.evaluation.options import OPEN_VOCABULARY, UNSUPERVISED


class Figure(NamedTuple):
    """A reported mIoU.

    Attributes:
      dataset: as `data.sets.SETS` calls it.
      method, model: SD3 is SD3-medium, SD3.5 SD3.5-medium.
      magnet: the images that MAGNET's adapters were trained on; None: without adapters.
      miou: in percent.
      source: the table.
    """

    dataset: str
    protocol: str
    method: str
    model: str
    magnet: str | None
    miou: float
    source: str

    @property
    def title(self) -> str:
        return f"{self.method}, {self.model}" + (f" + MAGNET on {self.magnet}" if self.magnet else "")


Line = tuple[str, str, str | None, tuple[float, ...]]
BY_NAMES = ("voc20", "coco-object", "context59", "ade20k150", "cityscapes19")
"""Table 1's columns. Background does not count."""
WITHOUT_NAMES = ("voc21", "context60", "coco-object", "coco-stuff27", "cityscapes19", "ade20k150")
"""Table 2's. Background is a class of the first three, `context60` what the paper calls Context59."""
TABLE_1: tuple[Line, ...] = (
    ("ProxyCLIP", "CLIP-H/14", None, (83.3, 49.8, 39.6, 24.2, 42.0)),
    ("CorrCLIP", "CLIP-H/14", None, (91.8, 52.7, 47.9, 28.8, 49.9)),
    ("DiffSegmenter", "SD1.5", None, (66.4, 40.0, 45.9, 24.2, 12.4)),
    ("iSeg", "SD1.5", None, (82.9, 57.3, 39.2, 24.2, 24.8)),
    ("Seg4Diff", "SD3", None, (89.2, 62.0, 49.0, 34.2, 26.5)),
    ("Seg4Diff", "SD3.5", None, (86.1, 57.8, 43.4, 30.7, 23.8)),
    ("Seg4Diff", "FLUX.1-dev", None, (83.1, 50.6, 38.2, 23.9, 17.1)),
    ("Seg4Diff", "SD3", "SA-1B", (89.1, 62.0, 49.1, 34.7, 25.4)),
    ("Seg4Diff", "SD3", "COCO", (89.8, 62.9, 51.2, 35.2, 26.0)),
)
TABLE_2: tuple[Line, ...] = (
    ("ReCO", "CLIP-L/14", None, (25.1, 19.9, 15.7, 26.3, 19.3, 11.2)),
    ("MaskCLIP", "CLIP-B/16", None, (38.8, 23.6, 20.6, 19.6, 10.0, 9.8)),
    ("MaskCut", "DINO-B/8", None, (53.8, 43.4, 30.1, 41.7, 18.7, 35.7)),
    ("DiffSeg", "SD1.5", None, (49.8, 48.8, 23.2, 44.2, 16.8, 37.7)),
    ("DiffCut", "SSD-1B", None, (62.0, 54.1, 32.0, 46.1, 28.4, 42.4)),
    ("Seg4Diff", "SD3", None, (54.9, 52.6, 38.5, 49.7, 24.2, 44.9)),
    ("Seg4Diff", "SD3.5", None, (52.3, 52.9, 36.8, 47.1, 24.2, 41.5)),
    ("Seg4Diff", "SD3", "SA-1B", (55.1, 52.8, 39.0, 50.8, 24.2, 45.0)),
    ("Seg4Diff", "SD3", "COCO", (56.1, 53.5, 38.8, 53.5, 24.4, 45.4)),
)


def _figures(source: str, protocol: str, sets: tuple[str, ...], lines: tuple[Line, ...]) -> Iterator[Figure]:
    for method, model, magnet, scores in lines:
        for dataset, miou in zip(sets, scores, strict=True):
            yield Figure(dataset, protocol, method, model, magnet, miou, source)


FIGURES = (
    *_figures("Table 1", OPEN_VOCABULARY, BY_NAMES, TABLE_1),
    *_figures("Table 2", UNSUPERVISED, WITHOUT_NAMES, TABLE_2),
)
