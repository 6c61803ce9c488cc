"""Reads images as pixels, and resizes pixels to the size that the model sees."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

from seg4diff_jax.image_files import ImageError, read_rgb, to_rgb

Resize = Literal["aspect", "square", "release"]
"""How an image is resized for the model: aspect ratio kept, squashed to the trained square, or as the release does."""

ASPECTS = ((1, 1), (4, 5), (3, 4), (2, 3), (9, 16), (1, 2), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1))
"""Aspect ratios, height to width: those of photographs, and 2:1 for panoramas."""

ImageInput = str | PathLike | Image.Image | np.ndarray


def listed(image: Any) -> tuple[list[Any], bool]:
    """Returns the images as a list, not read yet, and whether a single image was given."""
    single = isinstance(image, str | PathLike | np.ndarray) or hasattr(image, "convert")
    return ([image] if single else list(image)), single  # pyright: ignore[reportArgumentType]


def read_image(image: ImageInput) -> UInt8[np.ndarray, "height width 3"]:
    """Reads a file, a PIL image or an array as RGB pixels. EXIF rotation is applied, and transparency laid on white.

    Values of more than 8 bits are scaled and rounded. A PIL image is taken as Pillow has decoded its file.

    An array is uint8 [height, width] (gray) or [height, width, channels]: 1 gray, 2 gray and opacity, 3 RGB, 4 RGB and
    opacity. Each is treated as a file of that kind.

    Raises:
      ImageError: the file is missing, is damaged, is no image, holds several pictures, or does not say which pixel
        value is white; or the array is not of one of these kinds.
    """
    if isinstance(image, np.ndarray):
        pixels = _array_to_rgb(image)
    elif isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or "the PIL image"
        try:
            pixels = to_rgb(image)
        except Exception as error:  # Pillow's decoders raise almost anything at a damaged file
            raise ImageError(f"{name}: cannot be read as an image: {error}") from None
    else:
        try:
            pixels = read_rgb(Path(image).expanduser(), str(image))
        except FileNotFoundError:
            raise ImageError(f"{image}: no such file") from None
    if not pixels.size:
        raise ImageError(f"the image is empty: {list(pixels.shape)}")
    return pixels


def _array_to_rgb(array: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    channels = 1 if array.ndim == 2 else array.shape[-1]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 2, 3, 4):
        raise ImageError(
            f"the array is {array.dtype} {list(array.shape)}; expected uint8 [height, width, 3], or gray [height, "
            "width], or with opacity [height, width, 4]"
        )
    if channels == 1 or not array.size:
        return np.repeat(array.reshape(*array.shape[:2], channels)[:, :, :1], 3, axis=2)
    return array if channels == 3 else to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def model_size(height: int, width: int, *, trained: int, multiple: int, largest: int) -> tuple[int, int]:
    """Returns a height and width near the image's aspect ratio, with about trained^2 pixels.

    Args:
      height, width: the image's, in pixels.
      trained: side of the square images that the model was trained on, in pixels.
      multiple: both sides are multiples of this: the VAE's factor times the patch size.
      largest: longest side that the positional table allows, in pixels.
    """
    scale = trained / math.sqrt(height * width)
    nearest = lambda side: min(max(multiple, round(side * scale / multiple) * multiple), largest // multiple * multiple)
    return nearest(height), nearest(width)


def nearest_aspect(height: int, width: int) -> tuple[int, int]:
    """Returns the one of `ASPECTS` for which an image is stretched least."""
    return min(ASPECTS, key=lambda aspect: abs(math.log(height * aspect[1] / (width * aspect[0]))))


def check_size(size: tuple[int, int], *, multiple: int, largest: int) -> tuple[int, int]:
    """Returns `size` if the model can see images of it. `multiple` and `largest` are as for `model_size`.

    Raises ValueError for any other size.
    """
    if np.shape(size) != (2,) or not all(isinstance(side, int | np.integer) for side in size):
        raise ValueError(f"size is {size!r}; expected (height, width) in whole pixels")
    height, width = size
    if height % multiple or width % multiple or not 0 < min(height, width) <= max(height, width) <= largest:
        raise ValueError(f"size is {height} x {width}; sides must be multiples of {multiple}, up to {largest}")
    return height, width


def resize(
    pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int], how: Resize = "square"
) -> Shaped[np.ndarray, "rows columns 3"]:
    """Resizes pixels to the size that the model sees; values stay in 0..255.

    Args:
      size: height and width.
      how: "release" does as the released Seg4Diff does, whatever the image's size: the shorter side to 640,
        antialiased, then to `size`, bilinear without antialiasing and without rounding. Any other value resizes
        straight to `size`, bilinear and antialiased; an image that has this size already is not resampled.
    """
    if how != "release":
        if pixels.shape[:2] == tuple(size):
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    from seg4diff_jax.bilinear import resized_pixels  # imports JAX, which takes seconds and only this branch needs

    height, width = pixels.shape[:2]
    scale = 640 / min(height, width)
    halfway = (int(width * scale + 0.5), int(height * scale + 0.5))
    return resized_pixels(np.asarray(Image.fromarray(pixels).resize(halfway, Image.Resampling.BILINEAR)), size)


def to_model_range(pixels: Shaped[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Brings pixels from 0..255 to [-1, 1], fp32."""
    values = pixels.astype(np.float32)  # then in place: to allocate such an array costs more than the arithmetic
    values /= np.float32(127.5)
    values -= 1
    return values
