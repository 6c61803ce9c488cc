"""Reads PASCAL Context: 59 of the 459 ids of `trainval_merged.json`, whose masks are COCO run lengths.

VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg
VOCdevkit/VOC2010/trainval_merged.json
    "images": [{"image_id": 2008000002, "file_name": "2008_000002.jpg", "phase": "val", "height": .., "width": ..}]
    "annos_segmentation": [{"image_id": 2008000002, "category_id": 284, "segmentation": {"size": .., "counts": ..}}]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.labelled import IdTable, LabelledImages, first_of, published_split
from seg4diff_jax.data.names import listed
from seg4diff_jax.data.run_lengths import decoded
from seg4diff_jax.data.text_files import Annotations, read_json, unrepeated
from seg4diff_jax.segmentation.metrics import IGNORED

CLASSES = listed("""
aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat,
ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse,
keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves,
sidewalk, sign, sky, snow, sofa, diningtable, track, train, tree, truck, tvmonitor, wall, water, window, wood
""")
"""Names of the 59 classes. The file calls `diningtable` table."""
CLASS_IDS = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158,
    159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366,
    368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
"""Id of each class, one of the 459."""
BACKGROUND = len(CLASSES)
"""Index of the background class, in sets that have one: after the others."""
IDS = {
    **dict.fromkeys(range(460), IGNORED),
    **{published: index for index, published in enumerate(CLASS_IDS)},
}
"""Class of each id. The other 400 ids and unlabelled pixels (0) are ignored."""
IDS_WITH_BACKGROUND = {number: BACKGROUND if label == IGNORED else label for number, label in IDS.items()}
"""Class of each id. The other 400 ids and unlabelled pixels (0) are background."""
SPLITS = ("val", "train")
"""Splits of 5104 and of 4996 images."""
MOST_ID, MOST_SIDE = 2**31 - 1, 2**14
FILE = "trainval_merged.json"
ORIGIN = (
    f"VOCdevkit/VOC2010 with JPEGImages/ (VOCtrainval_03-May-2010.tar of the PASCAL VOC 2010 page) and {FILE} "
    "(of the PASCAL in Detail page)"
)
PLACES = ("", "VOC2010/", "VOCdevkit/VOC2010/")
KEPT = {"images", "annos_segmentation", "image_id", "file_name", "phase", "height", "width"}
KEPT |= {"category_id", "segmentation", "counts", "size"}
"""Keys of the file that are read. Parts, boundaries and boxes are dropped while parsing, since the file is large."""


@dataclass(frozen=True)
class MaskLabels:
    """Labels that are stored as masks of categories. A later mask covers earlier ones.

    Attributes:
      file: the file with the masks, for messages.
      names: names of the images.
      sizes: height and width of each image.
      masks: for each image, id and run lengths of its masks.
      classes: class of each id.
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


def read_context(root: str | Path, split: str | None, kind: str | None, ids: Mapping[int, int]) -> LabelledImages:
    """Returns the images of a split in alphabetical order.

    Args:
      root: VOC2010, or a directory that holds it or VOCdevkit.
      ids: class of each published id.

    Raises FolderError if a file is missing or not as described, ValueError for an unknown split.
    """
    split = published_split(split, SPLITS, "PASCAL Context")
    directory = first_of(root, [f"{place}JPEGImages" for place in PLACES], ORIGIN)
    file = first_of(root, [place + FILE for place in (*PLACES, "VOCdevkit/")], ORIGIN)
    contents = Annotations(read_json(file, ORIGIN, KEPT), file, ORIGIN)
    every = contents["images"].each()
    unrepeated([image["image_id"].whole(0, MOST_ID) for image in every], every)
    unrepeated([image["file_name"].text() for image in every], every)
    images = [image for image in every if image["phase"].among((*SPLITS, "test")) == split]
    images.sort(key=lambda image: image["file_name"].text())
    masks: dict[int, list[tuple[int, Any]]] = {image["image_id"].value: [] for image in images}
    for mask in contents["annos_segmentation"].each():
        if (number := mask["image_id"].whole(0, MOST_ID)) in masks:
            masks[number].append((mask["category_id"].whole(0, MOST_ID), mask["segmentation"].value))
    sizes = [(image["height"].whole(1, MOST_SIDE), image["width"].whole(1, MOST_SIDE)) for image in images]
    files = [directory / image["file_name"].text() for image in images]
    if not images:
        raise FolderError(f"{file} names no image of the split {split}; expected {ORIGIN}")
    names = [image.stem for image in files]
    labels = MaskLabels(file, names, sizes, list(masks.values()), IdTable(ids, "PASCAL Context has the ids 1 to 459"))
    return LabelledImages(names, files, labels, split)
