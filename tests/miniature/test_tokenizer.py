"""The miniature's tokenizers."""

from __future__ import annotations

import json

import pytest

from seg4diff_jax.miniature.tokenizer import learn_merges, write_tokenizers
from seg4diff_jax.miniature.world.shapes import CLASSES, scene
from seg4diff_jax.text import class_prompts, load_tokenizers, token_spans


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizers(directory):
    return load_tokenizers(directory)


def pieces(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_every_class_name_is_one_token_of_both_tokenizers(tokenizers):
    for tokenizer in (tokenizers.clip_l, tokenizers.clip_g):
        assert [len(pieces(tokenizer, name)) for name in CLASSES] == [1] * len(CLASSES)
        assert [span.start for span in token_spans(tokenizer, CLASSES)] == list(range(1, len(CLASSES) + 1))


def test_all_classes_fit_in_one_prompt(tokenizers):
    assert class_prompts(tokenizers, CLASSES).prompts == (" ".join(CLASSES),)


def test_every_word_of_a_caption_is_one_token(tokenizers):
    for index in range(60):
        text = scene("train", index, size=32).caption
        ids = tokenizers.clip_l(text).input_ids
        assert len(ids) == 2 + len(text.split()) + text.count(",")
        assert len(ids) <= 77


@pytest.mark.parametrize("text", ["zebra", "it 's 42 cafés ! ", "ünï 漢字 🦓", "balloon unboxed"])
def test_other_text_is_split_into_bytes_and_comes_back_whole(tokenizers, text):
    ids = pieces(tokenizers.clip_l, text)
    assert len(ids) > len(text.split())
    assert tokenizers.clip_l.decode(ids).split() == text.split() or "4" in text
    assert tokenizers.clip_l.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_the_end_token_has_the_largest_id_and_the_two_tokenizers_pad_as_sd3s(directory, tokenizers):
    entries = json.loads((directory / "tokenizer" / "vocab.json").read_text())
    assert len(entries) <= 1024
    assert tokenizers.clip_l.eos_token_id == max(entries.values()) == len(entries) - 1
    assert tokenizers.clip_l.pad_token_id == tokenizers.clip_l.eos_token_id
    assert tokenizers.clip_g.pad_token_id == entries["!"] == 0
    assert tokenizers.clip_l.model_max_length == tokenizers.clip_g.model_max_length == 77
    ids = tokenizers.clip_l("").input_ids
    assert ids == [entries["<|startoftext|>"], entries["<|endoftext|>"]]


def test_the_most_frequent_pair_is_merged_first():
    """By hand: a+b is in four words, c+d</w> in three, and so on."""
    merges = learn_merges(["abcd", "abx", "aby", "abz", "cd", "xcd"])
    assert merges[:2] == [("a", "b"), ("c", "d</w>")]
    assert ("ab", "cd</w>") in merges
    assert len(merges) == 7


def test_equal_words_give_equal_files(directory, tmp_path):
    write_tokenizers(tmp_path)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "tokenizer_2" / file).read_bytes() == (directory / "tokenizer_2" / file).read_bytes()
