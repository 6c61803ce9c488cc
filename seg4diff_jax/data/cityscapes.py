"""Reads Cityscapes with 19 classes, or with all 27 that it does not call void, from the fine annotations as published:

leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png
gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png         34 ids, of which 19 or 27 are classes
gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelTrainIds.png    the 19 classes, if cityscapesScripts made them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from seg4diff_jax.data.labelled import (
    IdTable,
    LabelledImages,
    PngLabels,
    first_of,
    images_in,
    published_kind,
    published_split,
)
from seg4diff_jax.data.names import listed
from seg4diff_jax.segmentation.metrics import IGNORED

CLASSES = listed("""
road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, rider,
car, truck, bus, train, motorcycle, bicycle
""")
CLASS_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Published id of each of the 19 classes."""
CLASSES_27 = listed("""
road, sidewalk, parking, rail track, building, wall, fence, guard rail, bridge, tunnel, pole, polegroup, traffic light,
traffic sign, vegetation, terrain, sky, person, rider, car, truck, bus, caravan, trailer, train, motorcycle, bicycle
""")
"""The classes of the ids 7 to 33. Unsupervised methods are scored on these."""
FIRST_ID = 7
NEGATIVE = (255, 65535)
"""The id -1 (a licence plate), as images of 8 and 16 bits hold it."""
IDS = {
    **dict.fromkeys((*range(34), *NEGATIVE), IGNORED),
    **{published: index for index, published in enumerate(CLASS_IDS)},
}
IDS_27 = IDS | {FIRST_ID + index: index for index in range(len(CLASSES_27))}
TRAIN_IDS = {**{index: index for index in range(len(CLASSES))}, **dict.fromkeys(NEGATIVE, IGNORED)}
SPLITS = ("val", "train", "test")
KINDS = ("labelIds", "labelTrainIds")
IMAGE = "_leftImg8bit.png"
ORIGIN = "leftImg8bit/ and gtFine/: leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of the Cityscapes page"


def read_cityscapes(
    root: str | Path, split: str | None, kind: str | None, ids: Mapping[int, int], *, kinds: Sequence[str] = KINDS
) -> LabelledImages:
    """Returns the images of a split, cities and images in alphabetical order.

    Args:
      root: the directory that holds leftImg8bit and gtFine.
      kind: labelIds or labelTrainIds. Default: labelIds, or labelTrainIds if the first image has only these.
      ids: class of each published id of labelIds.
      kinds: kinds of labels that tell all classes apart; train ids have only the 19 classes.

    Raises FolderError if a directory is missing, ValueError for an unknown split or kind.
    """
    split = published_split(split, SPLITS, "Cityscapes")
    kind = published_kind(kind, kinds, "Cityscapes")
    images = images_in(first_of(root, (f"leftImg8bit/{split}",), ORIGIN), f"*/*{IMAGE}", ORIGIN)
    labels = first_of(root, (f"gtFine/{split}",), ORIGIN)
    names = [file.name.removesuffix(IMAGE) for file in images]
    stems = [labels / file.parent.name / f"{name}_gtFine" for file, name in zip(images, names, strict=True)]
    files = {each: [stem.with_name(f"{stem.name}_{each}.png") for stem in stems] for each in kinds}
    kind = kind or next((each for each in kinds if files[each][0].is_file()), kinds[0])
    tables = {
        "labelIds": IdTable(ids, "Cityscapes has the ids -1 to 33"),
        "labelTrainIds": IdTable(TRAIN_IDS, f"Cityscapes has the train ids 0 to {len(CLASSES) - 1}, and 255"),
    }
    return LabelledImages(names, images, PngLabels(files[kind], tables[kind]), split, kind)
