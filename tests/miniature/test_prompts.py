"""Captions made prompts for training: what stays of them, what is added, and that each is a function of its number."""

from __future__ import annotations

import numpy as np
import pytest

from seg4diff_jax.miniature.flow_matching import InMemory
from seg4diff_jax.miniature.prompts import PromptItems, Prompts
from seg4diff_jax.miniature.scenes import caption_ids
from seg4diff_jax.miniature.tokenizer import write_tokenizers
from seg4diff_jax.miniature.world.shapes import CLASSES
from seg4diff_jax.text import load_tokenizers

CAPTION = "a red ball and two stars on grass"
SAID = CAPTION.split()
SHOWN = ["ball", "star", "grass"]
KINDS = ("clip_l", "clip_g")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(directory)
    return load_tokenizers(directory)


@pytest.fixture(scope="module")
def items(tokenizers) -> InMemory:
    """Many times the same picture."""
    labels = np.resize([CLASSES.index(name) for name in SHOWN], (8, 8)).astype(np.uint8)
    return InMemory([{"labels": labels, "latents": np.ones(3), **caption_ids(tokenizers, CAPTION)}] * 2000)


def words(tokenizer, ids) -> list[str]:
    return tokenizer.decode(ids).replace("<|startoftext|>", " [ ").replace("<|endoftext|>", " ] ").split()


def test_by_default_a_caption_is_its_prompt(tokenizers, items):
    prompts = PromptItems(items, Prompts(), tokenizers)
    assert len(prompts) == len(items)
    assert prompts[1]["latents"] is items[1]["latents"]
    for kind in KINDS:
        np.testing.assert_array_equal(prompts[1][kind], items[1][kind])
        assert prompts[1][kind].dtype == items[1][kind].dtype


@pytest.mark.parametrize("length", [77, 16])
def test_names_of_what_is_shown_follow_the_caption_to_the_end_in_changing_orders(tokenizers, items, length):
    prompts = PromptItems(items, Prompts(tokens=length, filled=1.0), tokenizers)
    item = prompts[0]
    assert item["clip_l"].shape == item["clip_g"].shape == (length,)
    read = words(tokenizers.clip_l, item["clip_l"])
    assert read == words(tokenizers.clip_g, item["clip_g"])
    assert (read[0], read[-1]) == ("[", "]")
    assert read[1 : 1 + len(SAID)] == SAID
    added = read[1 + len(SAID) : -1]
    rounds = [added[i : i + 3] for i in range(0, len(added) - 2, 3)]
    assert all(sorted(each) == sorted(SHOWN) for each in rounds)
    assert length == 16 or len({tuple(each) for each in rounds}) > 2
    np.testing.assert_array_equal(prompts[0]["clip_l"], item["clip_l"])
    assert len({prompts[index]["clip_l"].tobytes() for index in range(20)}) > (5 if length == 16 else 18)


def test_the_share_that_is_not_filled_keeps_its_padding(tokenizers, items):
    prompts = PromptItems(items, Prompts(tokens=40, filled=0.75), tokenizers)
    kept = sum(np.array_equal(prompts[index]["clip_g"], items[index]["clip_g"][:40]) for index in range(len(items)))
    assert 430 < kept < 570


@pytest.mark.parametrize("filled", [0.0, 1.0])
def test_a_caption_that_is_too_long_is_cut_off_before_its_end_token(tokenizers, items, filled):
    prompts = PromptItems(items, Prompts(tokens=6, filled=filled), tokenizers)
    for kind, tokenizer in zip(KINDS, (tokenizers.clip_l, tokenizers.clip_g), strict=True):
        assert words(tokenizer, prompts[0][kind]) == ["[", *SAID[:4], "]"]


@pytest.mark.parametrize("wrong", [{"tokens": 2}, {"tokens": 78}, {"filled": 1.5}, {"filled": -0.1}])
def test_impossible_prompts_are_refused(wrong):
    with pytest.raises(ValueError, match=f"prompts.{next(iter(wrong))} is"):
        Prompts(**wrong)
