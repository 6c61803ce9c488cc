"""The synthetic world of the miniature: scenes of patterned things over textured stuffs, with labels and a caption.

A scene is a pure function of its split and its index. Every pixel has a class, and the caption names every class in the
picture. Colours are random, so classes differ only in pattern and outline. Patterns repeat about every 8 to 16 pixels
of a picture of side 128, so an image token of 8 x 8 pixels shows its class.

    seg4diff scenes DIR --split test --count 500

writes scenes as a plain folder, see `write_folder`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from seg4diff_jax.miniature.world.captions import StuffSeen, ThingSeen, caption
from seg4diff_jax.miniature.world.composition import compose, label_map, picture
from seg4diff_jax.miniature.world.draws import Draws
from seg4diff_jax.miniature.world.stuffs import SIDE, TEXTURES
from seg4diff_jax.miniature.world.things import DRAWN

THINGS = tuple(DRAWN)
STUFFS = tuple(TEXTURES)
CLASSES = (*THINGS, *STUFFS)
"""Names of the classes: things, then stuffs, each in alphabetical order. A label is an index into this tuple."""

SPLITS = ("train", "validation", "test")
"""The splits. A scene's random numbers depend on its split's position here and on its index, so splits share none."""


class Scene(NamedTuple):
    """A picture, the class of each pixel, the classes in the picture (ascending), and a caption."""

    image: UInt8[np.ndarray, "size size 3"]
    labels: UInt8[np.ndarray, "size size"]
    classes: tuple[int, ...]
    caption: str


def scene(split: str, index: int, size: int = SIDE) -> Scene:
    """Returns scene `index` of a split, always the same. Another `size` shows the same scene with more or fewer pixels.

    On another processor sines may be rounded differently, which changes single pixels by a shade; captions stay the
    same. A thing whose visible part is close to the limit may be in the picture at one size and left out at another.

    Raises:
      ValueError: the split is unknown, the index negative, or the size below 32.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
    if index < 0 or size < 32:
        raise ValueError(f"expected index >= 0 and size >= 32, found {index=} and {size=}")
    draws = Draws(SPLITS.index(split), index)
    composed = compose(draws, size)
    things = [
        ThingSeen(thing.name, thing.palette.main, thing.palette.second, thing.size, thing.x / SIDE, thing.y / SIDE)
        for thing in composed.things
    ]
    stuffs = [StuffSeen(stuff.name, stuff.palette.main) for stuff in composed.stuffs]
    present = sorted({CLASSES.index(content.name) for content in (*composed.things, *composed.stuffs)})
    text = caption(things, stuffs, composed.upright, draws)
    return Scene(picture(composed), label_map(composed, CLASSES), tuple(present), text)


def write_folder(directory: str | Path, scenes: Iterable[Scene]) -> None:
    """Writes `images/00000.png ...`, `labels/00000.png ...`, `classes.txt` and `captions.json`.

    A label's pixel values are class indices. Line n of classes.txt, counted from 0, is the name of class n.
    captions.json maps a file's stem to its caption.

    Raises:
      FileExistsError: the directory already holds images or labels.
    """
    directory = Path(directory).expanduser()
    for name in ("images", "labels"):
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: name another directory, or remove it first")
    captions = {}
    for index, shown in enumerate(scenes):
        stem = f"{index:05d}"
        Image.fromarray(shown.image).save(directory / "images" / f"{stem}.png")
        Image.fromarray(shown.labels).save(directory / "labels" / f"{stem}.png")
        captions[stem] = shown.caption
    (directory / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    (directory / "captions.json").write_text(json.dumps(captions, indent=1) + "\n", encoding="utf-8")
