"""COCO 2017's 171 categories, 80 things and 91 stuffs, by supercategory, with published names and ids."""

from __future__ import annotations

from typing import NamedTuple


class Category(NamedTuple):
    """One category of COCO."""

    id: int
    name: str
    supercategory: str

    @property
    def thing(self) -> bool:
        """Whether the category is a thing, not a stuff."""
        return self.id <= LAST_THING


LAST_THING = 90
"""The largest id of a thing; larger ids are stuffs."""
SUPERCATEGORIES = {
    "person": "1 person",
    "vehicle": "2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat",
    "outdoor": "10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench",
    "animal": "16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe",
    "accessory": "27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase",
    "sports": (
        "34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, "
        "41 skateboard, 42 surfboard, 43 tennis racket"
    ),
    "kitchen": "44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl",
    "food": (
        "52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake"
    ),
    "furniture": "62 chair, 63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet",
    "electronic": "72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone",
    "appliance": "78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator",
    "indoor": "84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush",
    "textile": (
        "92 banner, 93 blanket, 104 cloth, 105 clothes, 109 curtain, 131 mat, 137 napkin, 141 pillow, 152 rug, "
        "167 textile-other, 168 towel"
    ),
    "plant": "94 branch, 97 bush, 119 flower, 124 grass, 129 leaves, 134 moss, 142 plant-other, 163 straw, 169 tree",
    "building": "95 bridge, 96 building-other, 128 house, 151 roof, 158 skyscraper, 166 tent",
    "furniture-stuff": (
        "98 cabinet, 107 counter, 108 cupboard, 110 desk-stuff, 112 door-stuff, 123 furniture-other, 130 light, "
        "133 mirror-stuff, 156 shelf, 161 stairs, 165 table"
    ),
    "structural": "99 cage, 113 fence, 138 net, 146 railing, 164 structural-other",
    "raw-material": "100 cardboard, 132 metal, 139 paper, 143 plastic",
    "floor": "101 carpet, 114 floor-marble, 115 floor-other, 116 floor-stone, 117 floor-tile, 118 floor-wood",
    "ceiling": "102 ceiling-other, 103 ceiling-tile",
    "sky": "106 clouds, 157 sky-other",
    "ground": (
        "111 dirt, 125 gravel, 126 ground-other, 136 mud, 140 pavement, 144 platform, 145 playingfield, "
        "147 railroad, 149 road, 154 sand, 159 snow"
    ),
    "water": "120 fog, 148 river, 155 sea, 178 water-other, 179 waterdrops",
    "food-stuff": "121 food-other, 122 fruit, 153 salad, 170 vegetable",
    "solid": "127 hill, 135 mountain, 150 rock, 160 solid-other, 162 stone, 182 wood",
    "wall": (
        "171 wall-brick, 172 wall-concrete, 173 wall-other, 174 wall-panel, 175 wall-stone, 176 wall-tile, "
        "177 wall-wood"
    ),
    "window": "180 window-blind, 181 window-other",
}
"""Ids and names of the categories of each supercategory. Supercategories are in the order of their first ids: 12 of
things, then 15 of stuffs."""


def _categories() -> tuple[Category, ...]:
    found = []
    for supercategory, listing in SUPERCATEGORIES.items():
        for entry in listing.split(", "):
            number, name = entry.split(" ", 1)
            found.append(Category(int(number), name, supercategory))
    return tuple(sorted(found))


CATEGORIES = _categories()
MERGED = {
    184: "tree",
    185: "fence",
    186: "ceiling-other",
    187: "sky-other",
    188: "cabinet",
    189: "table",
    190: "floor-other",
    191: "pavement",
    192: "mountain",
    193: "grass",
    194: "dirt",
    195: "paper",
    196: "food-other",
    197: "building-other",
    198: "rock",
    199: "wall-other",
    200: "rug",
}
"""Ids of panoptic labels that stand for several stuffs together, and the one of the 171 categories that names each."""
