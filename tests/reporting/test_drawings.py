"""Masks and words' maps over the picture: one call from a result to a picture."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.image_files import ImageError
from seg4diff_jax.reporting.overlays import CELL_LONGEST, heat_picture
from seg4diff_jax.reporting.segmentation_files import write_segmentation
from tests.reference.inputs import SIZE, VARIED, an_image

IMAGE = an_image(*SIZE)
PROMPT = "a cat and a giraffe, by the sea"


@pytest.fixture(scope="module")
def record(sd3) -> s4d.PromptAttention:
    return sd3.attention(IMAGE, PROMPT, blocks=VARIED)[VARIED]


def holds(sheet: Image.Image, picture: Image.Image) -> bool:
    """Whether a picture is somewhere on a sheet, pixel for pixel."""
    pixels, wanted = np.asarray(sheet), np.asarray(picture)
    height, width = wanted.shape[:2]
    corners = np.argwhere((pixels[: 1 - height, : 1 - width] == wanted[0, 0]).all(axis=-1))
    return any((pixels[y : y + height, x : x + width] == wanted).all() for y, x in corners)


def test_the_sheet_holds_the_heat_map_of_each_word_that_is_named(record, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    sheet = s4d.draw_words(tmp_path / "photo.png", record, ["giraffe", "the sea"])
    for word, there in (("giraffe", True), ("the sea", True), ("cat", False)):
        assert holds(sheet, heat_picture(IMAGE, np.asarray(record.of(word)), CELL_LONGEST)) == there
    sheet.save(tmp_path / "words.png")
    assert Image.open(tmp_path / "words.png").size == sheet.size
    one = s4d.draw_words(IMAGE, record, "cat")
    assert holds(one, heat_picture(IMAGE, np.asarray(record.of("cat")), CELL_LONGEST))
    assert one.width * one.height < sheet.width * sheet.height


def test_masks_are_drawn_as_the_command_line_draws_them(sd3, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    masks = sd3.segment(IMAGE, ["cat", "sea"], block=VARIED)
    write_segmentation(tmp_path / "out", IMAGE, masks, {})
    for image in (IMAGE, tmp_path / "photo.png"):
        np.testing.assert_array_equal(s4d.draw_masks(image, masks), Image.open(tmp_path / "out" / "overlay.png"))
    segments = s4d.UnsupervisedSegmentation(masks.labels, masks.scores)
    named = s4d.Segmentation(masks.labels, masks.scores, ("segment 1", "segment 2"), ("",))
    np.testing.assert_array_equal(s4d.draw_masks(IMAGE, segments), s4d.draw_masks(IMAGE, named))
    with pytest.raises(ValueError, match=r"^masks of \d+ x \d+ pixels on an image of 20 x 30: draw them on the image"):
        s4d.draw_masks(an_image(20, 30), masks)


def test_by_default_every_word_is_drawn_once(record):
    expected = s4d.draw_words(IMAGE, record, ["a", "cat", "and", "giraffe", "by", "the", "sea"])
    np.testing.assert_array_equal(s4d.draw_words(IMAGE, record), expected)


def test_what_cannot_be_drawn_is_refused(sd3, record):
    with pytest.raises(ValueError, match=f"^the prompt '{PROMPT}' has no 'dog': its words are a, cat, and, giraffe"):
        s4d.draw_words(IMAGE, record, ["cat", "dog"])
    with pytest.raises(ValueError, match=r"^no word to draw of the prompt ''$"):
        s4d.draw_words(IMAGE, sd3.attention(IMAGE, "", blocks=VARIED)[VARIED])
    with pytest.raises(ImageError, match=re.escape("absent.png: no such file")):
        s4d.draw_words(Path("absent.png"), record)


def test_a_word_that_the_prompt_says_twice_is_drawn_once_whatever_its_case(sd3):
    record = sd3.attention(IMAGE, "A cat and a Cat", blocks=VARIED)[VARIED]
    assert record.text.spoken == ["A", "cat", "and"]


def test_maps_that_are_no_numbers_are_refused(record):
    damaged = jax.tree.map(lambda leaf: leaf * np.nan, record)
    with pytest.raises(FloatingPointError, match="attention to 'cat' is not finite: damaged weights or inputs"):
        s4d.draw_words(IMAGE, damaged, ["cat"])
