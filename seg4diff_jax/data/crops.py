"""Crops pictures and their masks or labels for training: a square at the model's size, mirrored or not.

MAGNET resizes the shorter side of a picture to the trained size, cuts out a random square of that size, and mirrors
half of the pictures (Seg4Diff, section 4). Here a crop is a box in the stored picture. So a picture is resampled once,
and masks are taken from the same box by nearest pixels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image

Crop = Literal["random", "center", "squash"]
"""How pictures are cropped: a square as wide as the shorter side, at a random place or in the middle; or the whole
picture, squashed to a square."""


class View(NamedTuple):
    """A part of a picture: its edges, in pixels of the picture, and whether it is mirrored."""

    left: int
    top: int
    right: int
    bottom: int
    mirrored: bool = False

    @classmethod
    def of(cls, size: tuple[int, int], crop: Crop, random: np.random.Generator | None = None) -> View:
        """Chooses a view of a picture, not mirrored.

        Args:
          size: height and width of the picture.
          random: random numbers, needed for a random crop.
        """
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
        """Returns the view of an image, resampled bilinearly, antialiased. A part of that size is not resampled."""
        part = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=self[:4])
        pixels = np.asarray(part)
        return np.ascontiguousarray(pixels[:, ::-1]) if self.mirrored else pixels

    def nearest(self, drawn: Shaped[np.ndarray, "height width"], size: int) -> Shaped[np.ndarray, "size size"]:
        """Returns the view of labels or of a mask. Each new pixel takes the old pixel in which its centre lies."""
        rows, columns = _nearest(self.top, self.bottom, size), _nearest(self.left, self.right, size)
        return drawn[rows[:, None], columns[::-1] if self.mirrored else columns]


def _nearest(start: int, stop: int, count: int) -> Int[np.ndarray, " count"]:
    return start + ((2 * np.arange(count) + 1) * (stop - start)) // (2 * count)
