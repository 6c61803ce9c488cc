"""What sets of images with one named object each have in common: its pixels are foreground, all others background.

Such sets are scored as work on interpretability scores them (Chefer et al., CVPR 2021, arXiv 2012.09838, whose code is
github.com/hila-chefer/Transformer-Explainability, `baselines/ViT/imagenet_seg_eval.py`): labels are first brought to a
square of 224 x 224 pixels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

CLASSES = ("foreground", "background")
FOREGROUND, BACKGROUND = 0, 1
SIDE = 224
"""Side of the square on which labels are compared, in pixels: so an image counts as much as any other."""


def at_side(labels: UInt8[np.ndarray, "height width"], side: int = SIDE) -> UInt8[np.ndarray, "side side"]:
    """Brings labels of any size and shape to a square; each pixel is the nearest one, as in Pillow's `NEAREST`."""
    return np.asarray(Image.fromarray(labels).resize((side, side), Image.Resampling.NEAREST))
