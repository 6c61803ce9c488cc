"""Pictures that are part of a page: data URIs, as small as what they show allows."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from seg4diff_jax.reporting.colors import PALETTE_SIZE

IGNORED_COLOR = (226, 226, 226)
JPEG_QUALITY = 86
SMALL = 96
"""Pixels along the longer side up to which a photograph is kept without loss: it takes few bytes either way."""


@dataclass(frozen=True)
class Picture:
    """What an `img` element needs. `sharp`: its pixels are not to be smoothed when it is magnified."""

    title: str
    source: str
    width: int
    height: int
    sharp: bool = False


def photograph(title: str, picture: Image.Image, longest: int) -> Picture:
    """At most `longest` pixels along its longer side."""
    shown = _reduced(picture, longest, Image.Resampling.LANCZOS)
    if max(shown.size) <= SMALL:
        return _picture(title, shown, "png", optimize=True)
    return _picture(title, shown, "jpeg", quality=JPEG_QUALITY)


def drawing(
    title: str,
    labels: Integer[np.ndarray, "height width"],
    colors: UInt8[np.ndarray, "classes 3"],
    longest: int,
) -> Picture:
    """Labels in their classes' colours, those that name no class in grey; as large as `photograph` makes it."""
    used, places = np.unique(np.minimum(labels.astype(np.int64), len(colors)), return_inverse=True)
    table = np.concatenate([colors, np.array([IGNORED_COLOR], np.uint8)])[used]
    places = places.reshape(labels.shape)
    if len(used) <= PALETTE_SIZE:
        picture = Image.fromarray(places.astype(np.uint8))
        picture.putpalette(table.tobytes())
    else:
        picture = Image.fromarray(table[places])
    shown = _reduced(picture, longest, Image.Resampling.NEAREST)
    return _picture(title, shown, "png", sharp=max(shown.size) < longest, optimize=True)


def _reduced(picture: Image.Image, longest: int, resampling: Image.Resampling) -> Image.Image:
    scale = longest / max(picture.size)
    if scale >= 1:
        return picture
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), resampling)


def _picture(title: str, picture: Image.Image, kind: str, *, sharp: bool = False, **how: Any) -> Picture:
    file = BytesIO()
    picture.save(file, kind, **how)
    source = f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"
    return Picture(title, source, picture.width, picture.height, sharp)
