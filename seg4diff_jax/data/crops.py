"""What a training step sees of a picture and of what is drawn on it: a square, at the model's size, mirrored or not.

MAGNET's pictures are brought to a shorter side of the trained size, then a random square of that size is cut out, then
half of them are mirrored (Seg4Diff, section 4). Here the crop is a box in the picture as it is stored, so that pictures
are resampled once, and masks, which take the nearest pixel, in the same box.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image

Crop = Literal["random", "center", "squash"]
"""A square as wide as the shorter side, at a random place or in the middle; or the whole picture, squashed."""


class View(NamedTuple):
    """Part of a picture: edges in its pixels, and whether it is mirrored."""

    left: int
    top: int
    right: int
    bottom: int
    mirrored: bool = False

    @classmethod
    def of(cls, size: tuple[int, int], crop: Crop, random: np.random.Generator | None = None) -> View:
        """A view of a picture of that height and width, not mirrored. `random`: for a random crop."""
        height, width = size
        if crop == "squash":
            return cls(0, 0, width, height)
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        if crop == "random":
            assert random is not None, "a random crop takes random numbers"
            top, left = (int(random.integers(0, room + 1)) for room in (height - side, width - side))
        return cls(left, top, left + side, top + side)

    def picture(self, image: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
        """Resampled bilinearly, antialiased; a part that has that size is not resampled."""
        part = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=self[:4])
        pixels = np.asarray(part)
        return np.ascontiguousarray(pixels[:, ::-1]) if self.mirrored else pixels

    def nearest(self, drawn: Shaped[np.ndarray, "height width"], size: int) -> Shaped[np.ndarray, "size size"]:
        """Labels, or a mask: the pixel in whose area each new one's middle lies."""
        rows, columns = _nearest(self.top, self.bottom, size), _nearest(self.left, self.right, size)
        return drawn[rows[:, None], columns[::-1] if self.mirrored else columns]


def _nearest(start: int, stop: int, count: int) -> Int[np.ndarray, " count"]:
    return start + ((2 * np.arange(count) + 1) * (stop - start)) // (2 * count)
