"""Sheets of principal components: which colour, in which cell, under which name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import find_objects, label

from seg4diff_jax.reporting.component_sheet import component_colors, component_sheet
from seg4diff_jax.reporting.overlays import contact_sheet

RED, BLACK = (255, 0, 0), (0, 0, 0)


def one_red_each() -> np.ndarray:
    """Scores of two blocks on a grid of 2 x 3: in the n-th cell, by rows of the sheet, the n-th token is red."""
    scores = np.zeros((2, 3, 6, 3), np.float32)
    for token in range(6):
        scores[token % 2, token // 2, token, 0] = 0.25
    return scores


def test_each_component_is_a_channel_over_its_own_range():
    scores = np.array([[0, 5, -1], [0, 5, -1], [1e-3, 5, 0], [1e-3, 5, 0], [2e-3, 5, 1], [2e-3, 5, 1]], np.float32)
    expected = [[0, 0, 0], [0, 0, 0], [128, 0, 128], [128, 0, 128], [255, 0, 255], [255, 0, 255]]
    np.testing.assert_array_equal(component_colors(scores), expected)


def test_outlying_tokens_leave_the_range_to_the_others():
    scores = np.tile(np.arange(1000, dtype=np.float32)[:, None], 3)
    scores[0], scores[-1] = -1e6, 1e6
    red = component_colors(scores)[:, 0].astype(int)
    assert (red[:10] == 0).all()
    assert (red[-10:] == 255).all()
    np.testing.assert_allclose(red[10:-10], 255 * (np.arange(10, 990) - 9.99) / (989.01 - 9.99), atol=0.51)


def test_projections_are_rows_and_blocks_are_columns():
    sheet = np.asarray(component_sheet(one_red_each(), (2, 3)))
    drawn = (sheet == RED).all(axis=-1) | (sheet == BLACK).all(axis=-1)
    cells = find_objects(label(drawn)[0])
    assert len(cells) == 6
    for token, cell in enumerate(sorted(cells, key=lambda cell: (cell[0].start, cell[1].start))):
        picture = sheet[cell]
        height, width = picture.shape[:2]
        assert 2 * width == 3 * height
        assert width > 400
        expected = np.zeros((2, 3, 3), int)
        expected[token // 3, token % 3] = RED
        side = width // 3
        np.testing.assert_array_equal(picture, expected.repeat(side, axis=0).repeat(side, axis=1))


def test_each_cell_is_named_with_its_projection_and_block():
    sheet = component_sheet(one_red_each(), (2, 3), blocks=(7, 23))
    side = 150
    names = [(name, f"block {block}") for name in ("query", "key", "value") for block in (7, 23)]
    pictures = []
    for token in range(6):
        pixels = np.zeros((2, 3, 3), np.uint8)
        pixels[token // 3, token % 3] = RED
        pictures.append(Image.fromarray(pixels).resize((3 * side, 2 * side), Image.Resampling.NEAREST))
    expected = contact_sheet([(*name, picture) for name, picture in zip(names, pictures, strict=True)], columns=2)
    np.testing.assert_array_equal(sheet, expected)


@pytest.mark.parametrize(("blocks", "side"), [(1, 7), (24, 3), (38, 2)])
def test_squares_are_whole_pixels_however_many_blocks_there_are(blocks, side):
    scores = np.random.default_rng(0).integers(0, 2, (blocks, 3, 64 * 64, 3)).astype(np.float32)
    sheet = component_sheet(scores, (64, 64))
    assert sheet.width < 8192
    pixels, first = np.asarray(sheet), component_colors(scores[0, 0]).reshape(64, 64, 3)
    wanted = first.repeat(side, axis=0).repeat(side, axis=1)
    corners = np.argwhere((pixels[: sheet.height // 3, : sheet.width // blocks] == wanted[0, 0]).all(axis=-1))
    height, width = wanted.shape[:2]
    assert any(np.array_equal(pixels[y : y + height, x : x + width], wanted) for y, x in corners)


def test_what_cannot_be_drawn_is_refused():
    scores = one_red_each()
    with pytest.raises(ValueError, match=r"^scores of 6 tokens; expected 9, of a grid 3 x 3$"):
        component_sheet(scores, (3, 3))
    with pytest.raises(ValueError, match=r"^scores of 2 blocks and 1 block numbers; expected one for each$"):
        component_sheet(scores, (2, 3), blocks=(4,))
    scores[0, 1, 2, 0] = np.nan
    with pytest.raises(FloatingPointError, match=r"^principal components are not finite: damaged weights or inputs$"):
        component_sheet(scores, (2, 3))
