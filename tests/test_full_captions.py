"""Captions filled up with class names: what stays, what is added, and that each is a function of its number."""

from __future__ import annotations

import numpy as np
import pytest

from seg4diff_jax.data.shapes import CLASSES
from seg4diff_jax.miniature.tokenizer import write_tokenizers
from seg4diff_jax.text import load_tokenizers
from seg4diff_jax.training.flow_matching import InMemory
from seg4diff_jax.training.full_captions import FullCaptions, NameFiller
from seg4diff_jax.training.scenes import caption_ids

CAPTION = "a red ball and two stars on grass"
SHOWN = ["ball", "star", "grass"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(directory)
    return load_tokenizers(directory)


@pytest.fixture(scope="module")
def shown() -> np.ndarray:
    return np.array([CLASSES.index(name) for name in SHOWN])


def words(tokenizer, ids) -> list[str]:
    return tokenizer.decode(ids).replace("<|startoftext|>", " [ ").replace("<|endoftext|>", " ] ").split()


@pytest.mark.parametrize("length", [77, 16])
def test_names_of_what_is_shown_follow_the_caption_to_the_end_in_changing_orders(tokenizers, shown, length):
    ids = {name: tokens[:length] for name, tokens in caption_ids(tokenizers, CAPTION).items()}
    filled = NameFiller(tokenizers, 1.0)(ids, shown, np.random.default_rng(0))
    for name, tokenizer in (("clip_l", tokenizers.clip_l), ("clip_g", tokenizers.clip_g)):
        assert filled[name].shape == (length,)
        assert filled[name].dtype == ids[name].dtype
        read = words(tokenizer, filled[name])
        assert (read[0], read[-1]) == ("[", "]")
        assert "]" not in read[:-1]
        said = CAPTION.split()
        assert read[1 : 1 + len(said)] == said
        added = read[1 + len(said) : -1]
        rounds = [added[i : i + 3] for i in range(0, len(added) - 2, 3)]
        assert all(sorted(each) == sorted(SHOWN) for each in rounds)
        assert length == 16 or len({tuple(each) for each in rounds}) > 2
    assert words(tokenizers.clip_l, filled["clip_l"]) == words(tokenizers.clip_g, filled["clip_g"])


def test_the_share_that_is_not_filled_keeps_its_padding(tokenizers, shown):
    ids = caption_ids(tokenizers, CAPTION)
    filler, random = NameFiller(tokenizers, 0.75), np.random.default_rng(0)
    kept = sum(np.array_equal(filler(ids, shown, random)["clip_g"], ids["clip_g"]) for _ in range(2000))
    assert 430 < kept < 570


def test_a_prompt_without_room_is_left_alone(tokenizers, shown):
    ids = {name: tokens[:6] for name, tokens in caption_ids(tokenizers, CAPTION).items()}
    filled = NameFiller(tokenizers, 1.0)(ids, shown, np.random.default_rng(0))
    np.testing.assert_array_equal(filled["clip_l"], ids["clip_l"])


def test_items_are_filled_with_the_names_of_their_labels_the_same_each_time(tokenizers, shown):
    labels = np.resize(shown.astype(np.uint8), (8, 8))
    item = {"labels": labels, "latents": np.ones(3), **caption_ids(tokenizers, CAPTION)}
    items = FullCaptions(InMemory([item] * 4), NameFiller(tokenizers, 1.0))
    assert len(items) == 4
    read = [words(tokenizers.clip_l, items[index]["clip_l"])[9:-1] for index in range(4)]
    assert {name for each in read for name in each} == set(SHOWN)
    assert len({tuple(each) for each in read}) == 4
    np.testing.assert_array_equal(items[2]["clip_l"], items[2]["clip_l"])
    assert items[1]["latents"] is item["latents"]
