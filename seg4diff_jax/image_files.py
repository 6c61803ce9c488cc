"""Reads image files exactly: undamaged files with one picture, at their own bit depth.

Pillow silently changes what some files hold. It cuts 16 bits per channel to 8, scales gray of 2 and 4 bits to 0..255,
and ignores the checksums of a PNG's pixels. Here an image is read with the values that it holds, or is refused with a
reason.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

MOST_PIXELS = 178_956_970
"""Most pixels of an image. Pillow's limit is the same: twice its `MAX_IMAGE_PIXELS`."""
MOST_BYTES = 2**31
"""Most bytes of an image file."""
PNG_START = b"\x89PNG\r\n\x1a\n"
LAYERED = ("MPO", "PSD")
"""Formats with several frames that are parts or previews of one picture."""
WHITE_IS_65535 = ("PNG", "PPM")
"""Formats whose gray values Pillow returns as 32-bit numbers from 0 to 65535."""
LOW_BYTES: dict[str, str] = {
    f"{channels};16{order}": f"{channels};16{other}"
    for channels in ("RGB", "RGBA", "RGBX", "CMYK")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}
"""Each raw mode with 16 bits per channel, and the same mode in the other byte order.

Pillow decodes only the high byte of a 16-bit number. In the other byte order, the byte that it decodes is the low one.
"""
GRAY_AND_OPACITY = "LA;16B"
"""The raw mode of 16-bit gray and opacity, four bytes per pixel. Read as 8-bit RGBA, it gives all four bytes."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that each EXIF orientation asks for."""


class ImageError(ValueError):
    """An image cannot be read or used; the message names it."""


@contextmanager
def opened_image(file: Path | bytes, name: str) -> Iterator[tuple[Image.Image, bytes]]:
    """A context with an opened image and the bytes of its file. Pixels are not decoded yet.

    Args:
      file: a file, or the bytes of one.
      name: name of the image in messages.

    Raises:
      FileNotFoundError: there is no such file.
      ImageError: the file is no image, is damaged or too large, or holds several pictures; or the code in the context
        raises any other exception.
    """
    try:
        contents = file if isinstance(file, bytes) else _contents(file)
        if contents.startswith(PNG_START):
            _check_png(contents)
        with Image.open(BytesIO(contents)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels; expected at most {MOST_PIXELS}")
            if getattr(image, "is_animated", False) and image.format not in LAYERED:
                frames = getattr(image, "n_frames", "several")
                raise ValueError(f"it holds {frames} pictures; expected one: save that by itself")
            if image.format == "JPEG" and ImageFile.LOAD_TRUNCATED_IMAGES:
                _check_jpeg_ends(contents)
            yield image, contents
    except (FileNotFoundError, ImageError):
        raise
    except Exception as error:  # Pillow's decoders raise almost anything at a damaged file
        unknown = isinstance(error, UnidentifiedImageError)  # its message has an address in it
        reason = "it is of no format that Pillow reads" if unknown else error
        raise ImageError(f"{name}: cannot be read as an image: {reason}") from None


def _contents(file: Path) -> bytes:
    if file.is_dir():
        raise ImageError(f"{file}: is a directory; expected an image file")
    if file.exists() and not file.is_file():
        raise ImageError(f"{file}: is a device or a pipe; expected an image file")
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ImageError(f"{file}: has {size} bytes; expected an image of at most {MOST_BYTES}")
    return file.read_bytes()


def _check_png(contents: bytes) -> None:
    """Raises ValueError if a chunk does not match its checksum, or if the end is missing."""
    place, view = len(PNG_START), memoryview(contents)
    while place + 12 <= len(view):
        length, kind = struct.unpack_from(">I4s", view, place)
        end = place + 8 + length
        if end + 4 > len(view):
            break
        if zlib.crc32(view[place + 4 : end]) != struct.unpack_from(">I", view, end)[0]:
            raise ValueError(f"it is damaged: the checksum of its part {kind.decode('latin-1')!r} is not right")
        if kind == b"IEND":
            return
        place = end + 4
    raise ValueError("it is cut off")


def _check_jpeg_ends(contents: bytes) -> None:
    """Raises ValueError for a JPEG without an end. With `LOAD_TRUNCATED_IMAGES` set, Pillow would fill it with gray."""
    place = 2
    while place + 4 <= len(contents) and contents[place] == 0xFF and contents[place + 1] != 0xDA:
        place += 2 + struct.unpack_from(">H", contents, place + 2)[0]
    if contents.find(b"\xff\xd9", place) < 0:
        raise ValueError("it is cut off")


# ---- pictures -------------------------------------------------------------------------------------------------------


def read_rgb(file: Path | bytes, name: str, *, turned: bool = True) -> UInt8[np.ndarray, "height width 3"]:
    """Reads an image as RGB pixels. Transparency is laid on white; values of more than 8 bits are scaled and rounded.

    Args:
      turned: rotate the image as its EXIF data asks; otherwise it stays as it is stored.

    Raises as `opened_image` does; also ImageError if nothing says which pixel value is white.
    """
    with opened_image(file, name) as (image, contents):
        return to_rgb(image, _low_bytes(image, contents), turned=turned)


def to_rgb(
    image: Image.Image, low: Integer[np.ndarray, "height width *channels"] | None = None, *, turned: bool = True
) -> UInt8[np.ndarray, "height width 3"]:
    """Converts an opened image to RGB pixels.

    Args:
      low: the low bytes of 16-bit values, which Pillow does not read; None for other images.
      turned: as for `read_rgb`.

    Raises ValueError if nothing says which pixel value is white.
    """
    rgb = _on_white(_eight_bits(image, low))
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1)) if turned else None
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def _raw_mode(tile: Any) -> str:
    """Returns Pillow's name for the byte layout of a tile, or "" if it gives none."""
    first = tile.args[:1] if isinstance(tile.args, tuple) else (tile.args,)
    return first[0] if first and isinstance(first[0], str) else ""


def _low_bytes(image: Image.Image, contents: bytes) -> Integer[np.ndarray, "height width channels"] | None:
    raw = {_raw_mode(tile) for tile in getattr(image, "tile", ())}
    if len(raw) != 1 or not ({*LOW_BYTES, GRAY_AND_OPACITY} & raw):
        return None
    (mode,) = raw
    other = LOW_BYTES.get(mode, "RGBA")
    with Image.open(BytesIO(contents)) as again:
        tiles: Any = again.tile
        again.tile = [
            tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:])) for tile in tiles
        ]
        found = np.asarray(again)
    if mode != GRAY_AND_OPACITY:
        return found
    gray, opacity = found[..., 1], found[..., 3]
    return np.stack([gray, gray, gray, opacity], axis=-1)


def _eight_bits(image: Image.Image, low: Integer[np.ndarray, "height width *channels"] | None) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format not in WHITE_IS_65535):
        kind = "floating-point numbers" if image.mode == "F" else "whole numbers of 32 bits"
        raise ValueError(f"its pixels are {kind}, of which nothing says which is white: save it with 8 or 16 bits")
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        tags = getattr(image, "tag_v2", {})
        white = 2 ** int((tags.get(258) or (16,))[0]) - 1
        values = np.asarray(image).astype(np.int64)
        values = white - values if tags.get(262) == 0 else values  # TIFF's WhiteIsZero, which Pillow ignores
        gray = ((2 * values * 255 + white) // (2 * white)).clip(0, 255).astype(np.uint8)
        if not isinstance(key, int):
            return Image.fromarray(gray)
        return Image.fromarray(np.stack([gray, np.where(values == key, 0, 255).astype(np.uint8)], axis=-1))
    if low is None:
        return image
    deep = np.asarray(image).astype(np.uint32) << 8 | low
    eight = ((deep + 128) // 257).astype(np.uint8)  # 65535 = 257 * 255
    if isinstance(key, tuple):
        opacity = np.where((deep == np.array(key)).all(axis=-1, keepdims=True), 0, 255).astype(np.uint8)
        eight = np.concatenate([eight, opacity], axis=-1)
    return Image.fromarray(eight, "CMYK") if image.mode == "CMYK" else Image.fromarray(eight)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # colours are multiplied by opacity
        image = image.convert(image.mode.upper())
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- label maps -----------------------------------------------------------------------------------------------------


def read_label_png(file: Path | bytes, name: str) -> tuple[str, Integer[np.ndarray, "height width *channels"]]:
    """Returns Pillow's mode of a label image, and the numbers that its pixels hold. For a palette, these are indices.

    Raises as `opened_image` does; also ImageError for another format than PNG, for 16 bits per colour channel, and for
    EXIF data that ask for a rotation.
    """
    with opened_image(file, name) as (image, contents):
        if image.format != "PNG":
            lossy = ", which changes the numbers of classes" if image.format in ("JPEG", "WEBP") else ""
            raise ImageError(f"{name} is a {image.format} file{lossy}: expected a PNG that holds them as they are")
        bits, coloured = contents[24], image.mode.startswith("RGB")
        if coloured and bits == 16:
            raise ImageError(f"{name} is an image of {image.mode} with 16 bits a channel: expected 8")
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            raise ImageError(
                f"{name} has EXIF data that ask for a rotation: whether its image is meant turned or as it is stored "
                "nobody can tell; save the label upright and without them"
            )
        values = np.asarray(image)
        if image.mode == "L" and bits < 8:
            values = values // (255 // (2**bits - 1))  # Pillow has scaled them to 0..255
        return image.mode, values.astype(np.uint8) if values.dtype == bool else values
