"""How a set's classes are called in prompts, and what becomes of the one that stands for all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Spelling = Literal["own", "readable", "release"]
"""How class names are spelled, see `spelled`."""
Background = Literal["scored", "asked", "ignored"]
"""What becomes of the class that stands for all others.

    scored: a class like any other
    asked: its pixels do not count, but where it is present its name is asked for and takes pixels from other classes
    ignored: its pixels do not count and its name is not asked for
"""

Unlabelled = Literal["background", "ignored"]
"""What pixels are that nobody labelled, in a set that has a class for all that is none of the others."""

READABLE = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
    "windowpane": "window pane",
    "playingfield": "playing field",
    "waterdrops": "water drops",
    "raw-material": "raw material",
    # Cut, these two of the 27 supercategories would be called as two others are.
    "food-stuff": "prepared food",
    "furniture-stuff": "built-in furniture",
    "ceiling-tile": "tile ceiling",
    "floor-marble": "marble floor",
    "floor-stone": "stone floor",
    "floor-tile": "tile floor",
    "floor-wood": "wood floor",
    "wall-brick": "brick wall",
    "wall-concrete": "concrete wall",
    "wall-panel": "panel wall",
    "wall-stone": "stone wall",
    "wall-tile": "tile wall",
    "wall-wood": "wood wall",
    "window-blind": "window blind",
}
"""Names that no rule makes readable."""
SUFFIXES = ("-merged", "-other", "-stuff")
"""What tells classes of a set from others of the same name and is no part of the name."""


def listed(text: str) -> tuple[str, ...]:
    """The names of a list that commas part."""
    return tuple(name.strip() for name in text.split(","))


def spelled(names: Sequence[str], how: Spelling) -> tuple[str, ...]:
    """Class names as prompts have them, in order.

    own: as they are, which is what published results use.
    readable: words parted (`diningtable`, `wall_clock`), without suffixes such as `-other`, materials before what is
      made of them (`wall-brick`: brick wall).
    release: cut at the first `-`, as the released Seg4Diff does it in evaluation: several classes may get one name.

    Raises ValueError when two classes would be called the same and `how` is "readable".
    """
    if how == "own":
        return tuple(names)
    if how == "release":
        return tuple(name.split("-")[0] for name in names)
    found: dict[str, str] = {}
    for name in names:
        word = readable(name)
        if word in found:
            raise ValueError(
                f"data.names is 'readable', but classes {found[word]!r} and {name!r} would both be called {word!r}: "
                "give own, or rename one"
            )
        found[word] = name
    return tuple(found)


def readable(name: str) -> str:
    if name in READABLE:
        return READABLE[name]
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix) or name
    return " ".join(name.replace("_", " ").split()) or name
