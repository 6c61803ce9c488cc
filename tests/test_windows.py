"""Windows of scenes: the right piece of the latents, named by the classes that are in it."""

from __future__ import annotations

import numpy as np
import pytest

from seg4diff_jax.data.shapes import CLASSES
from seg4diff_jax.miniature.tokenizer import write_tokenizers
from seg4diff_jax.text import load_tokenizers
from seg4diff_jax.training.flow_matching import InMemory
from seg4diff_jax.training.full_captions import NameFiller
from seg4diff_jax.training.scenes import caption_ids
from seg4diff_jax.training.windows import SMALLEST_SHARE, Window, Windows

ROWS, FACTOR, SIDE = 12, 4, 5


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(directory)
    return load_tokenizers(directory)


@pytest.fixture(scope="module")
def scenes() -> InMemory:
    """Latents whose two channels are their row and column; labels in blobs of 7 pixels."""
    rng = np.random.default_rng(0)
    places = np.stack(np.meshgrid(np.arange(ROWS), np.arange(ROWS), indexing="ij"), axis=-1).astype(np.float16)
    blobs = rng.integers(len(CLASSES), size=(3, 7, 7)).astype(np.uint8)
    labels = blobs.repeat(7, axis=1).repeat(7, axis=2)[:, : ROWS * FACTOR, : ROWS * FACTOR]
    return InMemory([{"latents": places, "labels": each} for each in labels])


@pytest.fixture
def windows(scenes, tokenizers) -> Windows:
    return Windows(scenes, Window(side=SIDE, per_scene=10), tokenizers, NameFiller(tokenizers, 0.0))


def test_a_window_is_a_piece_of_its_scenes_latents_at_places_all_over(windows):
    assert len(windows) == 30
    corners = set()
    for index in range(len(windows)):
        latents = windows[index]["latents"]
        top, left = (int(number) for number in latents[0, 0])
        np.testing.assert_array_equal(latents, windows.scenes[0]["latents"][top : top + SIDE, left : left + SIDE])
        corners.add((top, left))
    assert len(corners) > 20
    assert {0, ROWS - SIDE} <= {row for row, _ in corners} | {column for _, column in corners}


def test_the_caption_names_each_class_that_shows_enough_of_itself_once(windows, tokenizers):
    words = tokenizers.clip_l
    several = 0
    for index in range(len(windows)):
        item = windows[index]
        top, left = (int(number) * FACTOR for number in item["latents"][0, 0])
        labels = windows.scenes[index // 10]["labels"][top : top + SIDE * FACTOR, left : left + SIDE * FACTOR]
        expected = {name for i, name in enumerate(CLASSES) if np.mean(labels == i) >= SMALLEST_SHARE}
        caption = words.decode(item["clip_l"], skip_special_tokens=True).split()
        assert sorted(caption) == sorted(expected)
        np.testing.assert_array_equal(item["clip_g"], caption_ids(tokenizers, " ".join(caption))["clip_g"][:16])
        several += caption != sorted(caption)
    assert several  # in no fixed order


def test_a_window_is_a_function_of_its_number(windows):
    for index in (0, 17):
        first, again = windows[index], windows[index]
        for field in first:
            np.testing.assert_array_equal(first[field], again[field])
