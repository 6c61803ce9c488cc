"""A picture of any depth and mode means what it holds, or is refused by name with the reason; so does a label map."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from seg4diff_jax import image_files
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.labelled import read_values
from seg4diff_jax.images import ImageError, read_image

GRAY, RGB, PALETTE, GRAY_AND_OPACITY, RGBA = 0, 2, 3, 4, 6
"""PNG's colour types."""
DEEP = np.random.default_rng(0).integers(0, 65536, (5, 4, 4))


def chunk(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))


def png(file: Path, values: np.ndarray, colour: int, bits: int, more: bytes = b"") -> Path:
    """A PNG written by the format's own definition, as Pillow cannot write all of them."""
    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    if bits < 8:
        spread = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = [np.packbits(row).tobytes() for row in spread.reshape(height, -1)]
    else:
        packed = [row.astype(">u2" if bits == 16 else "u1").tobytes() for row in rows]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed))
    parts = chunk(b"IHDR", header) + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return file


def tiff(file: Path, values: np.ndarray, *, bits: int, photometric: int, order: str = "<") -> Path:
    """An uncompressed TIFF by the format's own definition."""
    channels = values.shape[2] if values.ndim == 3 else 1
    if bits == 12:
        spread = (values.reshape(len(values), -1)[..., None] >> np.arange(11, -1, -1)) & 1
        pixels = np.packbits(spread.reshape(len(values), -1), axis=1).tobytes()
    else:
        pixels = values.astype(f"{order}u2").tobytes()
    entries = [(256, 4, values.shape[1]), (257, 4, values.shape[0]), (259, 3, 1), (262, 3, photometric)]
    entries += [(277, 3, channels), (278, 4, values.shape[0]), (279, 4, len(pixels))]
    place = 8 + 2 + 12 * (len(entries) + 2) + 4
    depths = struct.pack(f"{order}{channels}H", *[bits] * channels)
    found = [
        (
            tag,
            struct.pack(
                f"{order}HHI{'I' if kind == 4 else 'HH'}", tag, kind, 1, *((value,) if kind == 4 else (value, 0))
            ),
        )
        for tag, kind, value in entries
    ]
    shown = struct.pack(f"{order}I", place) if channels > 2 else depths.ljust(4, b"\0")
    found.append((258, struct.pack(f"{order}HHI", 258, 3, channels) + shown))
    found.append((273, struct.pack(f"{order}HHII", 273, 4, 1, place + len(depths))))
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(found))
    file.write_bytes(start + b"".join(entry for _, entry in sorted(found)) + bytes(4) + depths + pixels)
    return file


def eight(values: np.ndarray, white: int = 65535) -> np.ndarray:
    return np.floor(values / white * 255 + 0.5).astype(np.uint8)


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_16_bits_of_every_kind_of_png_are_scaled_and_rounded_not_cut(tmp_path):
    rgb, gray = eight(DEEP[..., :3]), eight(DEEP[..., 0])
    file = tmp_path / "deep.png"
    np.testing.assert_array_equal(read_image(png(file, DEEP[..., :3], RGB, 16)), rgb)
    np.testing.assert_array_equal(read_image(png(file, DEEP[..., 0], GRAY, 16)), np.stack([gray] * 3, -1))
    laid = lambda pixels, opacity: np.asarray(
        Image.alpha_composite(Image.new("RGBA", (4, 5), "white"), Image.fromarray(np.dstack([pixels, opacity])))
    )[..., :3]
    np.testing.assert_array_equal(read_image(png(file, DEEP, RGBA, 16)), laid(rgb, eight(DEEP[..., 3])))
    with_opacity = png(file, DEEP[..., [0, 3]], GRAY_AND_OPACITY, 16)
    np.testing.assert_array_equal(read_image(with_opacity), laid(np.stack([gray] * 3, -1), eight(DEEP[..., 3])))
    assert (rgb != (DEEP[..., :3] >> 8)).any()


def test_a_transparent_number_of_16_bits_is_one_of_65536(tmp_path):
    values = np.array([[300, 301], [65535, 0]])
    key = chunk(b"tRNS", struct.pack(">H", 300))
    np.testing.assert_array_equal(
        read_image(png(tmp_path / "gray.png", values, GRAY, 16, key))[..., 0], [[255, 1], [255, 0]]
    )
    key = chunk(b"tRNS", struct.pack(">HHH", 300, 300, 300))
    coloured = png(tmp_path / "rgb.png", np.stack([values] * 3, -1), RGB, 16, key)
    np.testing.assert_array_equal(read_image(coloured)[..., 1], [[255, 1], [255, 0]])


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_of_tiff_are_scaled_and_rounded_in_either_order_of_bytes(tmp_path, order):
    file = tiff(tmp_path / "deep.tiff", DEEP[..., :3], bits=16, photometric=2, order=order)
    np.testing.assert_array_equal(read_image(file), eight(DEEP[..., :3]))


def test_gray_of_tiff_means_black_and_white_as_the_file_says(tmp_path):
    gray = DEEP[..., 0]
    stacked = lambda values: np.stack([values] * 3, -1)
    np.testing.assert_array_equal(
        read_image(tiff(tmp_path / "a.tiff", gray, bits=16, photometric=1)), stacked(eight(gray))
    )
    np.testing.assert_array_equal(  # 0 is white
        read_image(tiff(tmp_path / "b.tiff", gray, bits=16, photometric=0)), stacked(eight(65535 - gray))
    )
    np.testing.assert_array_equal(  # the largest of 12 bits is 4095
        read_image(tiff(tmp_path / "c.tiff", gray >> 4, bits=12, photometric=1)), stacked(eight(gray >> 4, 4095))
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_reach_from_black_to_white(tmp_path, bits):
    values = np.arange(2**bits).reshape(2, -1)
    read = read_image(png(tmp_path / "few.png", values, GRAY, bits))
    np.testing.assert_array_equal(read[..., 0], values * 255 // (2**bits - 1))


def test_portable_maps_are_scaled_by_their_own_white(tmp_path):
    (tmp_path / "map.pgm").write_bytes(b"P5 3 1 1000\n" + struct.pack(">HHH", 0, 500, 1000))
    np.testing.assert_array_equal(read_image(tmp_path / "map.pgm")[0, :, 0], [0, 128, 255])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_of_which_nothing_says_which_is_white_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((3, 4), 70, dtype)).save(tmp_path / "depth.tiff")
    with pytest.raises(ImageError, match=r"depth\.tiff: cannot be read as an image: its pixels are (whole|floating)"):
        read_image(tmp_path / "depth.tiff")
    with pytest.raises(ImageError, match=r"of which nothing says which is white: save it with 8 or 16 bits"):
        read_image(Image.fromarray(np.full((3, 4), 70, dtype)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "La", "RGBa", "PA", "LAB"]
)
def test_every_mode_of_pillow_is_the_colour_that_it_holds_or_refused(mode):
    white = Image.new("RGBA", (3, 2), "white")
    try:
        image = {"La": "LA", "RGBa": "RGBA"}.get(mode)
        stored = white.convert(image).convert(mode) if image else white.convert("RGB").convert(mode)
    except ValueError:  # Pillow makes none of it
        stored = Image.new(mode, (3, 2))
        with pytest.raises(ImageError, match="the PIL image: cannot be read as an image: conversion"):
            read_image(stored)
        return
    assert (read_image(stored) >= 254).all()  # LAB rounds


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_several_pictures_in_one_file_are_refused(tmp_path, suffix):
    frames = [Image.fromarray(np.full((4, 5, 3), 60 * number, np.uint8)) for number in range(3)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(
        ImageError, match=rf"a\.{suffix}: cannot be read as an image: it holds 3 pictures; expected one"
    ):
        read_image(tmp_path / f"a.{suffix}")


def test_previews_beside_a_photograph_are_no_further_pictures(tmp_path):
    photo = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
    photo.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[photo.resize((8, 8))])
    assert read_image(tmp_path / "phone.jpg").shape == (16, 16, 3)


def test_an_absurd_size_is_refused_at_once(tmp_path, monkeypatch):
    Image.new("L", (30, 20)).save(tmp_path / "large.png")
    monkeypatch.setattr(image_files, "MOST_PIXELS", 599)
    with pytest.raises(ImageError, match=r"large\.png: .*it has 30 x 20 pixels; expected at most 599"):
        read_image(tmp_path / "large.png")
    vast = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**30, 2**30, 8, RGB, 0, 0, 0)) + chunk(b"IDAT", b"")
    (tmp_path / "vast.png").write_bytes(b"\x89PNG\r\n\x1a\n" + vast + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"vast\.png: cannot be read as an image: Image size"):
        read_image(tmp_path / "vast.png")
    monkeypatch.setattr(image_files, "MOST_BYTES", 20)
    with pytest.raises(ImageError, match=r"large\.png: has \d+ bytes; expected an image of at most 20"):
        read_image(tmp_path / "large.png")


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_every_bit_of_a_png_counts(tmp_path):
    values = np.random.default_rng(1).integers(0, 20, (12, 9), dtype=np.uint8)
    file = tmp_path / "label.png"
    stored = Image.fromarray(values)
    stored.putpalette([(37 * place) % 256 for place in range(768)])
    stored.save(file)
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        for read, error in ((read_values, FolderError), (read_image, ImageError)):
            with pytest.raises(error, match=rf"{re.escape(str(file))}"):
                read(file)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_cut_file_is_refused_whatever_a_program_has_told_pillow(tmp_path, monkeypatch, suffix):
    pixels = np.random.default_rng(2).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    file = tmp_path / f"photo.{suffix}"
    Image.fromarray(pixels).save(file)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    read_image(file)
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(ImageError, match=rf"photo\.{suffix}: cannot be read as an image: it is cut off"):
        read_image(file)


# ---- label maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [GRAY, PALETTE])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_labels_are_the_numbers_that_are_stored_at_any_depth(tmp_path, colour, bits):
    if (colour, bits) == (PALETTE, 16):
        pytest.skip("PNG has no palette of 16 bits")
    values = np.arange(24).reshape(4, 6) % 2**bits
    palette = bytes((37 * place) % 256 for place in range(3 * min(256, 2**bits)))
    more = chunk(b"PLTE", palette) + chunk(b"tRNS", bytes([0, 255])) if colour == PALETTE else b""
    read = read_values(png(tmp_path / "label.png", values, colour, bits, more))
    assert np.issubdtype(read.dtype, np.integer)
    np.testing.assert_array_equal(read, values)


def test_labels_of_another_format_are_refused_with_the_reason(tmp_path):
    file = tmp_path / "label.png"
    values = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(values).save(file, "JPEG")
    with pytest.raises(FolderError, match=r"label\.png is a JPEG file, which changes the numbers of classes: expected"):
        read_values(file)
    Image.fromarray(values).save(file, "TIFF")
    with pytest.raises(FolderError, match=r"label\.png is a TIFF file: expected a PNG"):
        read_values(file)


@pytest.mark.parametrize(
    ("colour", "channels", "bits"), [(RGB, 3, 8), (RGB, 3, 16), (RGBA, 4, 8), (GRAY_AND_OPACITY, 2, 8)]
)
def test_labels_of_several_channels_are_refused(tmp_path, colour, channels, bits):
    file = png(tmp_path / "label.png", np.zeros((4, 6, channels), int), colour, bits)
    with pytest.raises(FolderError, match=r"label\.png is an image of (mode )?(RGB|RGBA|LA)(:| with 16)"):
        read_values(file)


def test_labels_that_ask_to_be_turned_are_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "label.png", exif=exif)
    with pytest.raises(FolderError, match=r"label\.png has EXIF data that ask for a rotation"):
        read_values(tmp_path / "label.png")
