"""Image files become the pixels that people see, or a message that names the file; pixels come to the model's size."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from seg4diff_jax.images import ImageError, model_size, read_image, resize, to_model_range
from tests.reference.random_weights import relative_error
from tests.reference.release import as_they_are, squashed

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
CORNERS = np.array([[RED, GREEN, GREEN], [BLUE, WHITE, WHITE]], np.uint8)
"""No rotation or mirror image of it equals it."""


def random_pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_its_picture_and_its_array_are_the_same_pixels(tmp_path):
    pixels = random_pixels(5, 7)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    for image in (path, str(path), Image.fromarray(pixels), pixels):
        read = read_image(image)
        np.testing.assert_array_equal(read, pixels)
        assert read.dtype == np.uint8


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, CORNERS),
        (2, CORNERS[:, ::-1]),
        (3, CORNERS[::-1, ::-1]),
        (4, CORNERS[::-1]),
        (5, CORNERS.transpose(1, 0, 2)),
        (6, np.rot90(CORNERS)),
        (7, CORNERS[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(CORNERS, -1)),
    ],
)
def test_a_camera_held_otherwise_is_turned_upright(tmp_path, orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), CORNERS)
    with Image.open(tmp_path / "photo.png") as opened:
        np.testing.assert_array_equal(read_image(opened), CORNERS)


def test_a_cmyk_jpeg_has_its_colours(tmp_path):
    for colour in (RED, GREEN, BLUE, WHITE, (0, 0, 0)):
        Image.new("RGB", (16, 16), colour).convert("CMYK").save(tmp_path / "print.jpg", quality=100)
        with Image.open(tmp_path / "print.jpg") as opened:
            assert opened.mode == "CMYK"
        assert np.abs(read_image(tmp_path / "print.jpg").astype(int) - colour).max() <= 2


def test_gray_is_the_same_in_every_channel(tmp_path):
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    Image.fromarray(gray).save(tmp_path / "gray.png")
    for image in (tmp_path / "gray.png", gray):
        np.testing.assert_array_equal(read_image(image), np.repeat(gray[..., None], 3, axis=-1))


def test_black_and_white_pixels_are_0_and_255(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "fax.png")
    np.testing.assert_array_equal(read_image(tmp_path / "fax.png"), [[WHITE, (0, 0, 0)]])


def test_16_bits_are_scaled_to_8(tmp_path):
    deep = np.array([[0, 128, 129, 257], [32768, 65407, 65408, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = np.round(deep / 257).astype(np.uint8)
    np.testing.assert_array_equal(expected, [[0, 0, 1, 1], [128, 255, 255, 255]])
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), np.repeat(expected[..., None], 3, axis=-1))


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "logo.png")
    np.testing.assert_array_equal(read_image(tmp_path / "logo.png"), [[RED, WHITE, (204, 204, 204)]])
    gray = np.array([[(0, 255), (0, 0), (0, 51)]], np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png"), [[(0, 0, 0), WHITE, (204, 204, 204)]])


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1), (3, 4, 2), (3, 4, 3), (3, 4, 4)])
def test_an_array_is_read_as_a_file_of_its_kind_is(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    Image.fromarray(array.squeeze()).save(tmp_path / "same.png")
    np.testing.assert_array_equal(read_image(array), read_image(tmp_path / "same.png"))
    strided = np.flip(np.flip(array, 1).copy(), 1)  # as after a mirroring: not contiguous
    np.testing.assert_array_equal(read_image(strided), read_image(tmp_path / "same.png"))


def test_a_transparent_colour_of_a_palette_is_laid_on_white(tmp_path):
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode=None).convert("P")
    palette.putdata([0, 1, 2])
    palette.putpalette([*RED, *GREEN, *BLUE])
    palette.save(tmp_path / "icon.png", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "icon.png"), [[RED, WHITE, BLUE]])
    palette.save(tmp_path / "opaque.gif")
    np.testing.assert_array_equal(read_image(tmp_path / "opaque.gif"), [[RED, GREEN, BLUE]])


def test_a_transparent_colour_of_an_rgb_file_is_laid_on_white(tmp_path):
    Image.fromarray(CORNERS).save(tmp_path / "keyed.png", transparency=GREEN)
    expected = np.where((CORNERS == GREEN).all(-1, keepdims=True), 255, CORNERS)
    np.testing.assert_array_equal(read_image(tmp_path / "keyed.png"), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of TIFF
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(random_pixels(40, 50)).save(path)
    whole = path.read_bytes()
    for length in (0, 1, 10, 30, 60, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match=rf"{re.escape(str(path))}: cannot be read as an image: \w"):
            read_image(path)


def test_a_picture_opened_from_a_cut_file_is_refused_by_its_name(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(random_pixels(40, 50)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as opened, pytest.raises(ImageError, match=rf"{re.escape(str(path))}: cannot be read"):
        read_image(opened)


def test_what_is_no_image_file_is_refused_by_name(tmp_path):
    notes = tmp_path / "notes.png"
    notes.write_text("a cat on a sofa")
    with pytest.raises(ImageError, match=rf"{re.escape(str(notes))}: cannot be read as an image: it is of no format"):
        read_image(notes)
    damaged = tmp_path / "photo.ppm"  # Pillow raises a bare ValueError
    damaged.write_bytes(b"P6 4x 5 255 " + bytes(60))
    with pytest.raises(ImageError, match=rf"{re.escape(str(damaged))}: cannot be read as an image: invalid literal"):
        read_image(damaged)
    with pytest.raises(ImageError, match=rf"{re.escape(str(tmp_path))}: is a directory; expected an image file"):
        read_image(tmp_path)
    absent = tmp_path / "absent.png"
    with pytest.raises(ImageError, match=rf"{re.escape(str(absent))}: no such file"):
        read_image(str(absent))


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(CORNERS).save(tmp_path / "photo.png")
    np.testing.assert_array_equal(read_image("~/photo.png"), CORNERS)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((4, 5, 3), np.float32), r"float32 \[4, 5, 3\]"),
        (np.zeros((4, 5, 3), np.int64), r"int64 \[4, 5, 3\]"),
        (np.zeros((4, 5, 5), np.uint8), r"uint8 \[4, 5, 5\]"),
        (np.zeros((4, 5, 4), np.float32), r"float32 \[4, 5, 4\]"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"uint8 \[2, 4, 5, 3\]"),
    ],
)
def test_an_array_of_another_kind_is_refused(array, found):
    with pytest.raises(ImageError, match=rf"the array is {found}; expected uint8 \[height, width, 3\]"):
        read_image(array)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ImageError, match=r"the image is empty: \[0, 5, 3\]"):
        read_image(np.zeros((0, 5, 3), np.uint8))


# ---- the model's size -----------------------------------------------------------------------------------------------

SD3 = {"trained": 1024, "multiple": 16, "largest": 3072}


@pytest.mark.parametrize("image", [(480, 640), (375, 500), (3024, 4032), (1080, 1920), (100, 37), (1024, 1024)])
def test_the_aspect_is_kept_at_about_the_trained_number_of_pixels(image):
    height, width = model_size(*image, **SD3)
    assert height % 16 == width % 16 == 0
    assert abs(height * width / 1024**2 - 1) < 0.03
    assert abs((height / width) / (image[0] / image[1]) - 1) < 0.03


def test_known_sizes():
    assert model_size(1024, 1024, **SD3) == (1024, 1024)
    assert model_size(7, 7, **SD3) == (1024, 1024)
    assert model_size(480, 640, **SD3) == (880, 1184)  # 886.8 x 1182.4


def test_extreme_aspects_stay_within_the_positional_table():
    assert model_size(1, 10_000, **SD3) == (16, 3072)
    assert model_size(10_000, 1, **SD3) == (3072, 16)
    assert model_size(100, 2000, **SD3) == (224, 3072)  # 229 x 4579
    assert model_size(10_000, 1, trained=1024, multiple=16, largest=3080) == (3072, 16)


def test_an_image_that_has_the_size_is_not_resampled():
    pixels = random_pixels(32, 48)
    for how in ("aspect", "square"):
        assert resize(pixels, (32, 48), how) is pixels


@pytest.mark.parametrize("size", [(16, 16), (64, 32), (48, 160)])
def test_straight_to_the_size_is_pillows_antialiased_bilinear(size):
    pixels = random_pixels(50, 70)
    expected = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize(pixels, size), np.asarray(expected))
    np.testing.assert_array_equal(resize(np.full((50, 70, 3), 93, np.uint8), size), np.full((*size, 3), 93))


@pytest.mark.parametrize("image", [(50, 70), (700, 660), (640, 640), (1024, 1024), (641, 1000)])
@pytest.mark.parametrize("side", [128, 1024])
def test_the_releases_way_is_pillow_to_640_then_torchs_interpolation(image, side):
    pixels = random_pixels(*image)
    ours = to_model_range(resize(pixels, (side, side), "release"))
    assert ours.dtype == np.float32
    assert relative_error(ours.transpose(2, 0, 1)[None], squashed(pixels, side)) <= 1e-6


def test_the_releases_interpolation_takes_sides_that_differ():
    pixels = random_pixels(640, 700)
    expected = F.interpolate(as_they_are(pixels), size=(96, 160), mode="bilinear", align_corners=False)
    ours = to_model_range(resize(pixels, (96, 160), "release"))
    assert relative_error(ours.transpose(2, 0, 1)[None], expected) <= 1e-6


def test_pixels_run_from_minus_one_to_one():
    values = np.arange(256, dtype=np.uint8)
    ours = to_model_range(values)
    assert (ours[0], ours[-1]) == (-1, 1)
    np.testing.assert_array_equal(ours, (torch.from_numpy(values).float() / 127.5 - 1).numpy())


def test_reading_leaves_no_file_open(tmp_path, recwarn):
    Image.fromarray(CORNERS).save(tmp_path / "photo.png")
    for path in (tmp_path / "photo.png", Path(__file__)):
        with suppress(ImageError):
            read_image(path)
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]
