"""Pictures of segmentations: what is on them, where, and that it can be told apart."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.reporting import overlays
from seg4diff_jax.reporting.colors import HAND_PICKED, class_colors, heat_map, ink_on, oklab, palette
from seg4diff_jax.reporting.overlays import (
    MASK_OPACITY,
    contact_sheet,
    display_size,
    heat_picture,
    innermost,
    overlay,
    percent,
    save_labels,
    shares,
    shortened,
)
from seg4diff_jax.reporting.segmentation_files import RECORD, file_name, write_segmentation

DICHROMATS = {  # linear RGB as seen without one kind of cone (Machado et al. 2009, severity 1)
    "red-blind": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green-blind": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}
NAMES = [f"class number {index}" for index in range(300)]


def closest(colors: np.ndarray) -> float:
    """The least distance, in OKLab, between two of the colours."""
    lab = oklab(colors)
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return distance[~np.eye(len(lab), dtype=bool)].min()


def as_seen_by(colors: np.ndarray, kind: str) -> np.ndarray:
    encoded = colors / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(DICHROMATS[kind]).T, 0, 1)
    return np.round(255 * np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)).astype(np.uint8)


def quarters(height: int, width: int, classes: int = 4) -> np.ndarray:
    """Labels in equal vertical bands."""
    return np.broadcast_to(np.arange(width) * classes // width, (height, width)).astype(np.int32)


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, np.uint8)


# ---- colours --------------------------------------------------------------------------------------------------------


def test_the_256_colours_differ_visibly_and_those_picked_by_hand_come_first():
    assert palette().shape == (256, 3)
    assert closest(palette()) > 0.05
    assert closest(palette()[:20]) > 0.1
    np.testing.assert_array_equal(palette()[: len(HAND_PICKED)], HAND_PICKED)


@pytest.mark.parametrize("kind", DICHROMATS)
def test_the_first_eight_colours_stay_apart_for_the_colour_blind(kind):
    assert closest(as_seen_by(palette()[:8], kind)) > 0.06


def test_oklab_of_white_black_and_grey_is_their_lightness():
    lab = oklab(np.array([[255, 255, 255], [0, 0, 0], [120, 120, 120]], np.uint8))
    np.testing.assert_allclose(lab[:2], [[1, 0, 0], [0, 0, 0]], atol=1e-4)
    np.testing.assert_allclose(lab[2, 1:], 0, atol=1e-4)


def test_heat_colours_rise_in_lightness_in_equal_steps():
    lightness = oklab(heat_map())[:, 0]
    steps = np.diff(lightness)
    assert steps.min() > 0
    np.testing.assert_allclose(lightness, np.linspace(lightness[0], lightness[-1], 256), atol=0.01)


def test_letters_contrast_with_the_colour_they_stand_on():
    lightness = oklab(palette())[:, 0]
    ink = np.array([oklab(np.array(ink_on(color), np.uint8))[0] for color in palette()])
    assert np.abs(lightness - ink).min() > 0.3


# ---- label maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 27, 256])
def test_pixels_of_a_saved_label_map_are_class_indices_shown_in_class_colours(tmp_path, classes):
    labels = quarters(8, 512, classes)
    save_labels(tmp_path / "labels.png", labels, classes)
    saved = Image.open(tmp_path / "labels.png")
    assert saved.mode == "P"
    np.testing.assert_array_equal(np.asarray(saved), labels)
    np.testing.assert_array_equal(np.asarray(saved.convert("RGB")), class_colors(classes)[labels])


def test_more_classes_than_a_palette_holds_are_saved_in_16_bits(tmp_path):
    labels = quarters(4, 900, 300)
    save_labels(tmp_path / "labels.png", labels, 300)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "labels.png")), labels)


def test_shares_sum_to_one_and_absent_classes_have_none():
    np.testing.assert_allclose(shares(quarters(3, 8), 5), [0.25, 0.25, 0.25, 0.25, 0])


@pytest.mark.parametrize(("share", "text"), [(0.0, "0.0 %"), (1e-6, "<0.1 %"), (0.123, "12.3 %"), (1.0, "100.0 %")])
def test_a_small_share_is_not_shown_as_none(share, text):
    assert percent(share) == text


# ---- overlays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shown"), [((48, 64), 896), ((480, 640), 896), ((1500, 1200), 1500), ((30, 4000), 2048)]
)
def test_images_are_shown_at_a_size_to_look_at_with_their_aspect_kept(size, shown):
    height, width = display_size(*size)
    assert max(height, width) == shown
    assert height / width == pytest.approx(size[0] / size[1], rel=0.05)


@pytest.mark.parametrize("size", [(48, 64), (480, 640), (90, 900), (640, 360), (900, 90)])
@pytest.mark.parametrize("classes", [1, 2, 27])
def test_the_legend_shows_every_class_colour_outside_the_image(size, classes):
    picture = np.asarray(overlay(grey(*size), quarters(*size, 1), NAMES[:classes]))
    height, width = display_size(*size)
    legend = picture[:, width:] if size[0] > size[1] else picture[height:]
    found = {tuple(color) for color in np.unique(legend.reshape(-1, 3), axis=0).tolist()}
    assert {tuple(color) for color in class_colors(classes).tolist()} <= found
    assert not (legend[-1] != 255).any(), "the legend is cut off below"
    assert not (legend[:, -1] != 255).any(), "the legend is cut off at the right"


def test_a_mask_lets_the_image_through_and_its_borders_do_not():
    colors = class_colors(2)
    picture = np.asarray(overlay(grey(480, 640), quarters(480, 640, 2), ["left", "right"]))
    inside = (1 - MASK_OPACITY) * 100 + MASK_OPACITY * colors[0]
    np.testing.assert_allclose(picture[20, 20], inside, atol=1)
    np.testing.assert_array_equal(picture[20, 448], 255)
    np.testing.assert_array_equal(picture[20, 446], colors[0])
    np.testing.assert_array_equal(picture[20, 450], colors[1])


def test_names_stand_on_their_own_masks():
    picture = np.asarray(overlay(grey(480, 640), quarters(480, 640, 2), ["left", "right"]))
    for index, columns in enumerate([slice(100, 350), slice(550, 800)]):
        box = (picture[300:372, columns] == class_colors(2)[index]).all(axis=-1)
        assert box.sum() > 300


def test_long_names_are_cut_to_fit_and_short_ones_are_not():
    font = overlays._font(20)
    long = "a person in a long red jacket that holds a surfboard beside the sea " * 3
    assert shortened("a cat", font, 100) == "a cat"
    cut = shortened(long, font, 300)
    assert cut.endswith("...")
    assert long.startswith(cut.removesuffix("..."))
    assert 250 < font.getlength(cut) <= 300
    size = overlay(grey(480, 640), quarters(480, 640, 1), [long, "sky"]).size
    assert size[0] == display_size(480, 640)[1]


def test_the_innermost_point_is_as_far_from_the_outside_as_any():
    generator = np.random.default_rng(0)
    for _ in range(5):
        mask = generator.random((24, 31)) < 0.9
        x, y, reach = innermost(mask)
        rows, columns = np.nonzero(~np.pad(mask, 1))
        nearest = lambda x, y, r=rows, c=columns: (np.abs(r - 1 - y) + np.abs(c - 1 - x)).min()
        assert reach == nearest(x - 0.5, y - 0.5) == max(nearest(*p[::-1]) for p in np.argwhere(mask))
    assert innermost(np.zeros((4, 4), bool)) == (0, 0, 0)


# ---- heat maps ------------------------------------------------------------------------------------------------------


def test_a_heat_map_is_brightest_where_the_score_is_greatest():
    scores = np.zeros((6, 8), np.float32)
    scores[1, 6] = 1e-3
    picture = heat_picture(grey(480, 640), scores, longest=320)
    assert picture.size == (320, 240)
    y, x = np.unravel_index(oklab(np.asarray(picture))[..., 0].argmax(), (240, 320))
    assert (int(y) // 40, int(x) // 40) == (1, 6)


def test_a_heat_map_of_equal_scores_is_dark_everywhere():
    picture = np.asarray(heat_picture(grey(48, 64), np.full((3, 4), 0.5, np.float32)))
    assert (picture == picture[0, 0]).all()
    assert picture.max() < 128


@pytest.mark.parametrize("count", [1, 2, 28, 150])
def test_a_contact_sheet_holds_every_picture_once_under_its_title(count):
    colors = palette()[:count]
    cells = [(NAMES[i], "0 to 1 %", Image.new("RGB", (80, 60), tuple(map(int, colors[i])))) for i in range(count)]
    sheet = np.asarray(contact_sheet(cells))
    assert max(sheet.shape) <= 4096
    for color in colors:
        rows, columns = np.nonzero((sheet == color).all(axis=-1))
        assert len(rows) == 80 * 60
        assert (sheet[rows.min() - 14 : rows.min(), columns.min() : columns.max()] < 100).any()


# ---- the directory --------------------------------------------------------------------------------------------------


def segmentation(classes: tuple[str, ...]):
    scores = np.random.default_rng(0).random((len(classes), 3, 4), np.float32)
    return SimpleNamespace(labels=quarters(30, 40, len(classes)), scores=scores, classes=classes, prompts=("a",))


def test_writing_again_replaces_our_files_and_leaves_others_alone(tmp_path):
    write_segmentation(tmp_path, grey(30, 40), segmentation(("cat", "dog", "sky")), {"block": 1})
    (tmp_path / "notes.txt").write_text("mine")
    write_segmentation(tmp_path, grey(30, 40), segmentation(("traffic light", "a/b: c?")), {"block": 2})
    assert {path.name for path in (tmp_path / "heatmaps").iterdir()} == {"00_traffic_light.png", "01_a_b_c.png"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert '"block": 2' in (tmp_path / RECORD).read_text()


@pytest.mark.parametrize(("name", "file"), [("../x", "x"), ("猫", "猫"), ("???", "class"), ("a" * 300, "a" * 48)])
def test_class_names_become_safe_file_names(name, file):
    assert file_name(name) == file
