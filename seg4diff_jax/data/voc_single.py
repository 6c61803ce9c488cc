"""Reads the images of PASCAL VOC 2012 that hold exactly one of the 20 classes: its pixels are foreground.

ConceptAttention (arXiv 2502.04320) evaluates on such images. Its code is github.com/helblazer811/ConceptAttention,
`experiments/pascal_voc_segmentation/run_single_class_split_experiment.py`: it leaves out images that have more than two
classes, background among them. Files lie as `data.voc` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from seg4diff_jax.data import voc
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.labelled import LabelledImages, PngLabels
from seg4diff_jax.data.single_objects import BACKGROUND, FOREGROUND
from seg4diff_jax.segmentation.metrics import IGNORED

IDS = {published: BACKGROUND if published == 0 else FOREGROUND for published in voc.IDS} | {255: IGNORED}
"""Class of each published id: those of objects are one."""
READERS = 4
"""Threads that read labels."""


def read_single(root: str | Path, split: str | None, kind: str | None, ids: Mapping[int, int]) -> LabelledImages:
    """Returns the images of a split with one class each, in the order of its list; `objects` has their classes' names.

    All labels of the split are read once to find them. Borders, whose pixels are ignored, do not count as a class.

    Args:
      root, split, kind: as for `voc.read_voc`.
      ids: class of each published id, foreground or background.

    Raises FolderError if a file is missing, a label cannot be read or no image has one class, ValueError for an unknown
    kind.
    """
    every, numbered = (voc.read_voc(root, split, kind, each) for each in (ids, voc.IDS))
    assert isinstance(every.labels, PngLabels)

    def classes_of(index: int) -> list[int]:
        labels = numbered.labels(index)
        return np.flatnonzero(np.bincount(labels[labels != IGNORED])).tolist()

    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(classes_of, range(len(every))))
    places = [place for place, classes in enumerate(found) if len(classes) == 1]
    if not places:
        raise FolderError(f"{root}: no image of {every.split} holds exactly one class; expected {voc.ORIGIN}")
    return replace(
        every,
        names=[every.names[place] for place in places],
        images=[every.images[place] for place in places],
        labels=replace(every.labels, files=[every.labels.files[place] for place in places]),
        objects=tuple(voc.CLASSES[found[place][0]] for place in places),
    )
