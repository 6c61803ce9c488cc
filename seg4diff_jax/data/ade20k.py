"""Reads ADE20K with 150 classes (the scene parsing benchmark), as published:

ADEChallengeData2016/images/validation/ADE_val_00000001.jpg
ADEChallengeData2016/annotations/validation/ADE_val_00000001.png    class + 1; 0 is none of them
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from seg4diff_jax.data.labelled import IdTable, LabelledImages, PngLabels, first_of, images_in, published_split
from seg4diff_jax.data.names import listed
from seg4diff_jax.segmentation.metrics import IGNORED

CLASSES = listed("""
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
glass, clock, flag
""")
IDS = {0: IGNORED, **{index + 1: index for index in range(len(CLASSES))}}
SPLITS = ("validation", "training")
ORIGIN = (
    "ADEChallengeData2016 with images/ and annotations/: ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark "
    "page"
)


def read_ade20k(root: str | Path, split: str | None, kind: str | None, ids: Mapping[int, int]) -> LabelledImages:
    """Returns the images of a split in alphabetical order.

    Args:
      root: ADEChallengeData2016, or the directory that holds it.
      ids: class of each published id.

    Raises FolderError if a directory is missing, ValueError for an unknown split.
    """
    split = published_split(split, SPLITS, "ADE20K")
    home = first_of(root, ("annotations", "ADEChallengeData2016/annotations"), ORIGIN).parent
    images = images_in(first_of(home, (f"images/{split}",), ORIGIN), "*.jpg", ORIGIN)
    labels = first_of(home, (f"annotations/{split}",), ORIGIN)
    names = [file.stem for file in images]
    table = IdTable(ids, f"ADE20K's {len(CLASSES)} classes are 1 to {len(CLASSES)}, and 0 is none of them")
    return LabelledImages(names, images, PngLabels([labels / f"{name}.png" for name in names], table), split)
