"""Reads COCO 2017 with labels for every pixel, COCO-Stuff's maps or the panoptic ones, as published:

val2017/000000000139.jpg                          or images/val2017/...
stuffthingmaps/val2017/000000000139.png           category id - 1; 255 unlabelled
annotations/panoptic_val2017.json                 which category each segment is of
annotations/panoptic_val2017/000000000139.png     segment id = red + 256 green + 65536 blue; 0 unlabelled
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from seg4diff_jax.data.coco_categories import CATEGORIES, MERGED, SUPERCATEGORIES
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.labelled import (
    IdTable,
    LabelledImages,
    Labels,
    PngLabels,
    first_of,
    images_in,
    published_kind,
    published_split,
    read_stored,
)
from seg4diff_jax.data.text_files import Annotations, read_json, unrepeated
from seg4diff_jax.segmentation.metrics import IGNORED

UNLABELLED = 0
"""The category id, here, of pixels that nobody labelled."""
BACKGROUND = 0
"""Index of the background class, in sets that have one: before the 80 things."""
THINGS = tuple(category.name for category in CATEGORIES if category.thing)
OBJECT_CLASSES = ("background", *THINGS)
STUFF27_CLASSES = tuple(SUPERCATEGORIES)
"""The 27 supercategories: 12 of things, then 15 of stuffs."""
CLASSES = tuple(category.name for category in CATEGORIES)
GROUPS = {"things": range(len(THINGS)), "stuffs": range(len(THINGS), len(CLASSES))}
STUFF27_GROUPS = {"things": range(12), "stuffs": range(12, len(STUFF27_CLASSES))}


def _ids(class_of: Mapping[str, int]) -> dict[int, int]:
    """Returns the class of each category id, from the class of each category's name.

    The ids of panoptic labels for merged categories are included.
    """
    named = {category.id: class_of[category.name] for category in CATEGORIES}
    return {UNLABELLED: IGNORED, **named, **{number: class_of[name] for number, name in MERGED.items()}}


IDS = _ids({name: index for index, name in enumerate(CLASSES)})
_OBJECTS = {each.name: THINGS.index(each.name) + 1 if each.thing else BACKGROUND for each in CATEGORIES}
OBJECT_IDS = {**_ids(_OBJECTS), UNLABELLED: BACKGROUND}
"""Class of each category id for the 80 things. Unlabelled pixels, 4 % of all, are background, as in the conversions of
GroupViT, TCL, SCLIP and DiffCut."""
STUFF27_IDS = _ids({category.name: STUFF27_CLASSES.index(category.supercategory) for category in CATEGORIES})

PANOPTIC = "COCO's panoptic annotations"
MOST_SEGMENT = 256**3 - 1
KEPT = {"annotations", "categories", "file_name", "segments_info", "id", "category_id"}
"""Keys of the listing that are read."""
SPLITS = ("val", "train")
KINDS = ("stuffthingmaps", "panoptic")


def _origin(year: str) -> str:
    return (
        f"COCO 2017 with {year}/ ({year}.zip of the COCO page) and either stuffthingmaps/{year}/ "
        f"(stuffthingmaps_trainval2017.zip of the COCO-Stuff page) or annotations/panoptic_{year}/ and its .json "
        "(panoptic_annotations_trainval2017.zip of the COCO page)"
    )


ORIGIN = _origin("val2017")


@dataclass(frozen=True)
class PanopticLabels:
    """Labels that hold segment numbers. A separate file lists the category of each segment.

    Attributes:
      files: the label image of each image.
      segments: number and category id of each image's segments; None for an image that is not listed.
      listing: the file that lists the segments.
      classes: class of each category id.
    """

    files: list[Path]
    segments: list[Int[np.ndarray, "_ 2"] | None]
    listing: Path
    classes: IdTable

    def __call__(self, index: int, /) -> UInt8[np.ndarray, "height width"]:
        known = self.segments[index]
        if known is None:
            raise FolderError(f"{self.listing} lists no segments of {self.files[index].name}: expected every image's")
        segment = _segment_numbers(self.files[index])
        numbers, place = np.unique(segment, return_inverse=True)
        category = {0: UNLABELLED, **dict(known.tolist())}
        if unknown := [number for number in numbers.tolist() if number not in category]:
            raise FolderError(f"{self.place(index)}: segment {unknown[0]} is not listed in {self.listing}")
        ids = np.array([category[number] for number in numbers.tolist()])
        return self.classes(ids[place].reshape(segment.shape), self.place(index))

    def place(self, index: int, /) -> str:
        return str(self.files[index])


def _segment_numbers(file: Path) -> Int[np.ndarray, "height width"]:
    mode, pixels = read_stored(file, str(file))
    if mode != "RGB":
        raise FolderError(f"{file} is an image of mode {mode}: expected RGB, which holds the numbers of segments")
    return pixels.astype(np.int64) @ np.array([1, 256, 65536])


def read_coco(root: str | Path, split: str | None, kind: str | None, ids: Mapping[int, int]) -> LabelledImages:
    """Returns the images of a split in alphabetical order.

    Args:
      root: the directory that holds val2017, or images/val2017, and the labels.
      kind: stuffthingmaps or panoptic. Default: the first that is there. Panoptic labels have 133 categories, which
        merge some of the 171 (`coco_categories.MERGED`).
      ids: class of each category id, and of `UNLABELLED`.

    Raises FolderError if a file is missing or not as described, ValueError for an unknown split or kind.
    """
    split = published_split(split, SPLITS, "COCO 2017")
    kind = published_kind(kind, KINDS, "COCO 2017")
    year = f"{split}2017"
    origin = _origin(year)
    homes = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations")
    places = {
        "stuffthingmaps": [f"{home}/{year}" for home in homes],
        "panoptic": [f"annotations/panoptic_{year}", f"panoptic_{year}"],
    }
    images = images_in(first_of(root, (f"images/{year}", year), origin), "*.jpg", origin)
    labels = first_of(root, [place for each in KINDS if kind in (None, each) for place in places[each]], origin)
    names = [file.stem for file in images]
    files = [labels / f"{name}.png" for name in names]
    if labels.name == year:
        return LabelledImages(names, images, _map_labels(files, ids), split, KINDS[0])
    listing = first_of(root, [f"{place}.json" for place in places["panoptic"]], origin)
    table = IdTable(ids, "those are category ids; COCO's panoptic ones are 1 to 90 of things and 92 to 200 of stuffs")
    panoptic = PanopticLabels(files, _segments(listing, names), listing, table)
    return LabelledImages(names, images, panoptic, split, KINDS[1])


def _map_labels(files: list[Path], ids: Mapping[int, int]) -> Labels:
    values = {category.id - 1: ids[category.id] for category in CATEGORIES}
    expected = "COCO-Stuff's values are category ids - 1: 0 to 89 things, 91 to 181 stuffs, and 255 unlabelled"
    return PngLabels(files, IdTable({**values, 255: ids[UNLABELLED]}, expected))


def _segments(listing: Path, names: list[str]) -> list[Int[np.ndarray, "_ 2"] | None]:
    """Returns number and category id of each image's segments; None for an image that is not listed."""
    contents = Annotations(read_json(listing, PANOPTIC, KEPT), listing, PANOPTIC)
    if "categories" in contents:
        categories = contents["categories"].each()
        unrepeated([category["id"].whole(1, MOST_SEGMENT) for category in categories], categories)
    annotations = contents["annotations"].each()
    stems = [Path(each["file_name"].text()).stem for each in annotations]
    unrepeated(stems, annotations)
    found = {}
    for stem, each in zip(stems, annotations, strict=True):
        segments = each["segments_info"].each()
        numbers = [segment["id"].whole(1, MOST_SEGMENT) for segment in segments]
        unrepeated(numbers, segments)
        categories = [segment["category_id"].whole(1, MOST_SEGMENT) for segment in segments]
        found[stem] = np.array([numbers, categories], np.int64).T
    return [found.get(name) for name in names]
