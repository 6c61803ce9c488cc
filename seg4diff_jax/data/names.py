"""The names of a set's classes in prompts, and the rules for background and unlabelled pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Spelling = Literal["own", "readable", "release"]
"""How class names are spelled in prompts; see `spelled`."""
Background = Literal["scored", "asked", "ignored"]
"""The rule for the background class, which stands for all other classes.

    scored: it is a class like any other
    asked: its pixels do not count; if it is present, its name is asked for and takes pixels from other classes
    ignored: its pixels do not count, and its name is not asked for
"""

Unlabelled = Literal["background", "ignored"]
"""The rule for pixels that nobody labelled, in a set with a background class: they are background, or ignored."""

READABLE = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
    "windowpane": "window pane",
    "playingfield": "playing field",
    "waterdrops": "water drops",
    "raw-material": "raw material",
    # Without their suffixes, these two of the 27 supercategories would have the names of two others.
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
"""Readable names of classes for which the rules of `readable` do not suffice."""
SUFFIXES = ("-merged", "-other", "-stuff")
"""Suffixes that only tell a set's classes of one name apart. They are not part of the name."""


def listed(text: str) -> tuple[str, ...]:
    """Splits a list of names at its commas."""
    return tuple(name.strip() for name in text.split(","))


def spelled(names: Sequence[str], how: Spelling) -> tuple[str, ...]:
    """Returns class names as prompts spell them, in order.

    own: the set's own names, which published results use.
    readable: words separated (`diningtable`, `wall_clock`), without suffixes such as `-other`, and materials first
      (`wall-brick` is brick wall).
    release: cut at the first `-`, as in the evaluation of the released Seg4Diff. Several classes may get one name.

    Raises ValueError if `how` is "readable" and two classes would get one name.
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
    """Returns the readable spelling of one class name."""
    if name in READABLE:
        return READABLE[name]
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix) or name
    return " ".join(name.replace("_", " ").split()) or name
