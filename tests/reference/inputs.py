"""Made images, noise and class names for the small checkpoints."""

from __future__ import annotations

import numpy as np

SIZE = (112, 144)
"""What the small models see of any image of that aspect."""
SQUARE = 128
"""Side of the squares that the small checkpoints say they were trained on."""
NAMES = ["cat", "dog", "traffic light", "zebra crossing", "sofa", "sky", "giraffe", "tree"]
BLOCK = 3
VARIED = 0
"""The block whose labels vary: in later ones random weights make the image's tokens alike, and one class wins."""


def an_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def a_noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """For an image seen at that size."""
    return np.random.default_rng(1000 + seed).standard_normal((height // 8, width // 8, 16), dtype=np.float32)
