"""Pictures and labels of known pixels, written as published sets have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GRAY = 90
"""All that `picture` shows: JPEG keeps it."""
TURNED = 6
"""EXIF's number for pixels that are to be turned clockwise by a quarter."""


def picture(file: Path, size: tuple[int, int] = (2, 3), mode: str = "RGB", orientation: int | None = None) -> Path:
    """A picture of one gray as a file of height x width pixels, stored in a mode of Pillow's."""
    file.parent.mkdir(parents=True, exist_ok=True)
    value = {"L": GRAY, "RGB": (GRAY,) * 3, "CMYK": (0, 0, 0, 255 - GRAY)}[mode]
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new(mode, size[::-1], value).save(file, exif=exif)
    return file


def label(file: Path, values: Any, *, palette: bool = False) -> Path:
    """Whole numbers as an image of 8 bits, or of 16 where they need it; with a palette as VOC has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(values)
    image = Image.fromarray(array.astype(np.uint8 if array.max() < 256 else np.uint16))
    if palette:
        image.putpalette([(37 * place) % 256 for place in range(768)])
        assert image.mode == "P"
    image.save(file)
    return file


def text(file: Path, contents: str | Sequence[str] | dict) -> Path:
    """Lines, or JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(contents, dict):
        file.write_text(json.dumps(contents))
    else:
        file.write_text(contents if isinstance(contents, str) else "".join(f"{line}\n" for line in contents))
    return file
