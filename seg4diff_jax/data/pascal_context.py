"""PASCAL Context: 59 of the 459 ids of `trainval_merged.json`, whose masks are COCO run lengths.

VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg
VOCdevkit/VOC2010/trainval_merged.json
    "images": [{"image_id": 2008000002, "file_name": "2008_000002.jpg", "phase": "val", "height": .., "width": ..}]
    "annos_segmentation": [{"image_id": 2008000002, "category_id": 284, "segmentation": {"size": .., "counts": ..}}]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from seg4diff_jax.data.labelled import FolderError, IdTable, LabelledImages, first_of, published_split
from seg4diff_jax.data.names import listed
from seg4diff_jax.segmentation.metrics import IGNORED

CLASSES = listed("""
aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat,
ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse,
keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves,
sidewalk, sign, sky, snow, sofa, diningtable, track, train, tree, truck, tvmonitor, wall, water, window, wood
""")
"""`diningtable` is what the file calls table."""
CLASS_IDS = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158,
    159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366,
    368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
"""Id of each class among the 459."""
BACKGROUND = len(CLASSES)
"""Its index where it is a class: after the others."""
IDS = {
    **dict.fromkeys(range(460), IGNORED),
    **{published: index for index, published in enumerate(CLASS_IDS)},
}
"""Class of each id, the other 400 and what nobody labelled (0) left out."""
IDS_WITH_BACKGROUND = {number: BACKGROUND if label == IGNORED else label for number, label in IDS.items()}
"""The same with a class for those."""
SPLITS = ("val", "train")
FILE = "trainval_merged.json"
ORIGIN = (
    f"VOCdevkit/VOC2010 with JPEGImages/ (VOCtrainval_03-May-2010.tar of the PASCAL VOC 2010 page) and {FILE} "
    "(of the PASCAL in Detail page)"
)
PLACES = ("", "VOC2010/", "VOCdevkit/VOC2010/")
KEPT = {"images", "annos_segmentation", "image_id", "file_name", "phase", "height", "width"}
KEPT |= {"category_id", "segmentation", "counts", "size"}
"""Names in the file that are read: parts, boundaries and boxes are let go at once, as the file is large."""


@dataclass(frozen=True)
class MaskLabels:
    """Labels that are masks of categories, one laid on the other.

    Attributes:
      masks: for each image its masks: id and run lengths.
      sizes: height and width of each image.
    """

    file: Path
    names: list[str]
    sizes: list[tuple[int, int]]
    masks: list[list[tuple[int, Any]]]
    classes: IdTable

    def __call__(self, index: int, /) -> UInt8[np.ndarray, "height width"]:
        ids = np.zeros(self.sizes[index], np.int32)
        for category, mask in self.masks[index]:
            ids[decoded(mask, self.sizes[index], self.place(index))] = category
        return self.classes(ids, self.place(index))

    def place(self, index: int, /) -> str:
        return f"{self.file}, {self.names[index]}"


def decoded(mask: Any, size: tuple[int, int], place: str) -> np.ndarray:
    """COCO's run lengths, which run down the columns, as a mask: bool [height, width].

    Raises FolderError when they are of another size or damaged.
    """
    from pycocotools import mask as run_lengths

    try:
        found = tuple(mask["size"])
        if isinstance(mask["counts"], list):
            if sum(mask["counts"]) != found[0] * found[1]:
                raise ValueError(f"counts make {sum(mask['counts'])} pixels")
            mask = run_lengths.frPyObjects(mask, *found)
        pixels = run_lengths.decode(mask) if found == size else None
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FolderError(f"{place}: a mask is damaged: {error}") from None
    if pixels is None:
        raise FolderError(f"{place}: a mask is of size {found}; expected the image's, {size} (height, width)")
    return pixels.astype(bool)


def read_context(root: str | Path, split: str | None, kind: str | None, ids: Mapping[int, int]) -> LabelledImages:
    """The images of a split, in alphabetical order.

    Args:
      root: VOC2010, or a directory that holds it or VOCdevkit.
      ids: class of each published id.

    Raises FolderError when something is not where it should be or not as described, ValueError for another split.
    """
    split = published_split(split, SPLITS, "PASCAL Context")
    directory = first_of(root, [f"{place}JPEGImages" for place in PLACES], ORIGIN)
    file = first_of(root, [place + FILE for place in (*PLACES, "VOCdevkit/")], ORIGIN)
    try:
        with file.open(encoding="utf-8") as opened:
            contents = json.load(opened, object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k in KEPT})
        images = [image for image in contents["images"] if image["phase"] == split]
        images.sort(key=lambda image: image["file_name"])
        masks: dict[int, list[tuple[int, Any]]] = {image["image_id"]: [] for image in images}
        for mask in contents["annos_segmentation"]:
            if mask["image_id"] in masks:
                masks[mask["image_id"]].append((mask["category_id"], mask["segmentation"]))
        sizes = [(image["height"], image["width"]) for image in images]
        files = [directory / image["file_name"] for image in images]

    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{file} cannot be read: {error!r}; expected {ORIGIN}") from None
    if not images:
        raise FolderError(f"{file} names no image of the split {split}; expected {ORIGIN}")
    names = [image.stem for image in files]
    labels = MaskLabels(file, names, sizes, list(masks.values()), IdTable(ids, "PASCAL Context has the ids 1 to 459"))
    return LabelledImages(names, files, labels, split)
