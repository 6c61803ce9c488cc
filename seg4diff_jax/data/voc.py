"""Reads PASCAL VOC 2012 with 20 classes, as published:

VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt      names, one a line
VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg
VOCdevkit/VOC2012/SegmentationClass/2007_000033.png   class + 1, with a palette; 0 background, 255 border
VOCdevkit/VOC2012/SegmentationClassAug/...            the same for more images (those of SBD)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.labelled import SYNONYMS, IdTable, LabelledImages, PngLabels, first_of, published_kind, visible
from seg4diff_jax.data.names import listed
from seg4diff_jax.data.text_files import read_lines
from seg4diff_jax.segmentation.metrics import IGNORED

CLASSES = listed("""
aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person,
pottedplant, sheep, sofa, train, tvmonitor
""")
BACKGROUND = len(CLASSES)
"""Index of the background class, in sets that have one: after the others, as in the released Seg4Diff."""
IDS = {0: IGNORED, **{index + 1: index for index in range(len(CLASSES))}, 255: IGNORED}
"""Class of each published id, with background ignored."""
KINDS = ("SegmentationClass", "SegmentationClassAug")
ORIGIN = (
    "VOCdevkit/VOC2012 with ImageSets/, JPEGImages/ and SegmentationClass/: VOCtrainval_11-May-2012.tar of the PASCAL "
    "VOC 2012 page (SegmentationClassAug is handed out with DeepLab)"
)


def read_voc(root: str | Path, split: str | None, kind: str | None, ids: Mapping[int, int]) -> LabelledImages:
    """Returns the images of a split, in the order of its list.

    Args:
      root: VOC2012, or a directory that holds it or VOCdevkit.
      split: name of a list in ImageSets/Segmentation without its ending: val (default), train, trainval, or a list that
        was added, such as train_aug.
      kind: SegmentationClass or SegmentationClassAug. Default: the first of these that is there. For a split with "aug"
        in its name, SegmentationClassAug comes first.
      ids: class of each published id.

    Raises FolderError if a file is missing, ValueError for an unknown kind.
    """
    lists = first_of(
        root, [f"{place}ImageSets/Segmentation" for place in ("", "VOC2012/", "VOCdevkit/VOC2012/")], ORIGIN
    )
    home = lists.parents[1]
    split, names = _listed_names(lists, split or "val")
    kind = published_kind(kind, KINDS, "VOC2012")
    kinds = (kind,) if kind else KINDS[::-1] if "aug" in split else KINDS
    labels = first_of(home, kinds, ORIGIN)
    images = [home / "JPEGImages" / f"{name}.jpg" for name in names]
    table = IdTable(ids, f"VOC's {len(CLASSES)} classes are 1 to {len(CLASSES)}, 0 is background, 255 a border")
    files = [labels / f"{name}.png" for name in names]
    return LabelledImages(names, images, PngLabels(files, table), split, labels.name)


def _listed_names(lists: Path, split: str) -> tuple[str, list[str]]:
    """Returns the split's own name, and the image names in the first column of its list, which may also be paths."""
    for word in (split, SYNONYMS.get(split, split)):
        file = lists / f"{word}.txt"
        if file.is_file():
            names = [Path(line.split()[0]).stem for line in read_lines(file, "names of images, one a line") if line]
            if not names:
                raise FolderError(f"{file} is empty; expected names of images, one a line")
            if len(set(names)) < len(names):
                twice = next(name for place, name in enumerate(names) if name in names[:place])
                raise FolderError(f"{file} names {twice} twice; expected each image once")
            return word, names
    there = ", ".join(sorted(path.stem for path in visible(lists.glob("*.txt")))) or "none"
    raise FolderError(f"{lists / split}.txt: no such file; the lists there are: {there}; expected {ORIGIN}")
