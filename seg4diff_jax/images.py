"""Images in: files to pixels, and pixels to the size that the model sees."""

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
"""How an image comes to the model's size: aspect kept, squashed to the trained square, or as the release does it."""

ASPECTS = ((1, 1), (4, 5), (3, 4), (2, 3), (9, 16), (1, 2), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1))
"""Height to width: those of photographs, and of panoramas from 2:1 on."""

ImageInput = str | PathLike | Image.Image | np.ndarray


def listed(image: Any) -> tuple[list[Any], bool]:
    """A list of images that are still to be read, and whether there was a single one."""
    single = isinstance(image, str | PathLike | np.ndarray) or hasattr(image, "convert")
    return ([image] if single else list(image)), single  # pyright: ignore[reportArgumentType]


def read_image(image: ImageInput) -> UInt8[np.ndarray, "height width 3"]:
    """A file, a PIL image or an array as RGB pixels; EXIF rotation is applied, transparency laid on white.

    Numbers of more than 8 bits are scaled and rounded. A PIL image is what Pillow has made of its file.

    An array is uint8 [height, width] (gray) or [height, width, channels]: 1 gray, 2 gray and opacity, 3 RGB, 4 RGB and
    opacity, each treated as a file of that kind.

    Raises:
      ImageError: the file is missing, damaged or no image, holds several pictures or numbers of which nothing says
        which is white, or the array is not of one of these kinds.
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
    """Height and width near the image's aspect with about trained^2 pixels.

    Args:
      height, width: of the image.
      trained: side of the squares that the model was trained on.
      multiple: both sides are multiples of it: the VAE's factor times the patch size.
      largest: longest side that the positional table allows.
    """
    scale = trained / math.sqrt(height * width)
    nearest = lambda side: min(max(multiple, round(side * scale / multiple) * multiple), largest // multiple * multiple)
    return nearest(height), nearest(width)


def nearest_aspect(height: int, width: int) -> tuple[int, int]:
    """The one of `ASPECTS` that an image comes to with the least stretching."""
    return min(ASPECTS, key=lambda aspect: abs(math.log(height * aspect[1] / (width * aspect[0]))))


def check_size(size: tuple[int, int], *, multiple: int, largest: int) -> tuple[int, int]:
    """Height and width that the model can see. `multiple`, `largest`: as for `model_size`.

    Raises ValueError for any other.
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
    """Pixels at the size that the model sees, 0..255; an image that already has it is not resampled.

    Args:
      size: height and width.
      how: "release" is the released Seg4Diff's way: shorter side to 640, antialiased, then bilinear without
        antialiasing and without rounding, whatever the image's size. Otherwise straight to `size`, bilinear and
        antialiased.
    """
    if how != "release":
        if pixels.shape[:2] == tuple(size):
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    from seg4diff_jax.bilinear import resized_pixels  # imports JAX, which others need not wait for

    height, width = pixels.shape[:2]
    scale = 640 / min(height, width)
    halfway = (int(width * scale + 0.5), int(height * scale + 0.5))
    return resized_pixels(np.asarray(Image.fromarray(pixels).resize(halfway, Image.Resampling.BILINEAR)), size)


def to_model_range(pixels: Shaped[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """0..255 to [-1, 1], fp32."""
    values = pixels.astype(np.float32)  # then in place: new arrays of this size cost more than the arithmetic
    values /= np.float32(127.5)
    values -= 1
    return values
