"""Damaged tokenizers are refused by their folder or file, or make the ids that the sound ones make."""

from __future__ import annotations

import json
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NoReturn

import pytest

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.readers import Source
from seg4diff_jax.convert.tokenizers import open_tokenizers
from seg4diff_jax.models.encoders import TokenIds
from seg4diff_jax.text import tokenize
from tests.reference.small_tokenizers import write_clip_tokenizer, write_t5_tokenizer

FOLDERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
PROMPTS = ["a cat on the sofa", "traffic light", "zebra crossing, é 12"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_clip_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>")
    write_clip_tokenizer(folder / "tokenizer_2", pad_token="!")
    write_t5_tokenizer(folder / "tokenizer_3")
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def ids(folder: Path) -> TokenIds:
    def no_weights(name: str) -> NoReturn:
        raise AssertionError(name)

    with warnings.catch_warnings(action="ignore"):
        source = Source(str(folder), {}, no_weights, {name: folder / name for name in FOLDERS})
        return tokenize(open_tokenizers(source, t5=True), PROMPTS)


def rewrite(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("tokenizer/tokenizer_config.json", {"model_max_length": "77"}, "model_max_length is '77'"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 77.5}, "model_max_length is 77.5"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -1}, "model_max_length is -1"),
        ("tokenizer_2/vocab.json", {"a</w>": 0}, "two tokens of its vocabulary have one id"),
        ("tokenizer_2/vocab.json", {"a</w>": "x"}, "cannot be read as a CLIPTokenizer"),
        ("tokenizer_3/tokenizer_config.json", {"model_max_length": []}, "model_max_length is []"),
    ],
)
def test_a_value_of_another_type_is_told_with_the_tokenizers_folder(folder, file, values, said):
    rewrite(folder / file, **values)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str((folder / file).parent))}.*{re.escape(said)}"):
        ids(folder)


@pytest.mark.parametrize("contents", [b"", b"{}", b"[]", b"null", b"\0" * 50, b"\xff\xfe", b'{"a": NaN}'])
@pytest.mark.parametrize(
    "file",
    ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer_3/spiece.model"],
)
def test_a_file_of_other_contents_is_refused(folder, file, contents):
    (folder / file).write_bytes(contents)
    with pytest.raises(CheckpointError) as caught:
        ids(folder)
    assert str((folder / file).parent) in str(caught.value)


def test_a_vocabulary_whose_merges_are_cut_off_is_refused_not_spelt(folder):
    merges = folder / "tokenizer" / "merges.txt"
    lines = merges.read_text("utf-8").splitlines()
    merges.write_text("\n".join(lines[:-1]), "utf-8")
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(merges))}: 1 words of vocab\.json are made by no merge"
    ):
        ids(folder)


def damaged(contents: bytes, draws: random.Random) -> bytes:
    place = draws.randrange(len(contents))
    return draws.choice(
        [
            contents[:place],
            contents[:place] + bytes([contents[place] ^ (1 << draws.randrange(8))]) + contents[place + 1 :],
            contents[:place] + contents[place + draws.randrange(1, 40) :],
        ]
    )


@pytest.mark.parametrize("seed", range(40))
def test_drawn_damage_to_a_vocabulary_ends_in_one_sentence_or_changes_nothing_silently(folder, sound, seed):
    """A flipped letter makes another word of a vocabulary, which only its own checksum could tell: ids stay ids."""
    draws = random.Random(seed)
    file = folder / draws.choice(["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_3/spiece.model"])
    file.write_bytes(damaged(file.read_bytes(), draws))
    found, refusal = None, f"{folder}: none"
    try:
        found = ids(folder)
    except CheckpointError as error:
        refusal = str(error)
    assert str(folder) in refusal
    assert len(refusal.splitlines()) == 1
    for own, expected in zip(found or (), ids(sound) if found else (), strict=True):
        assert getattr(own, "shape", None) == getattr(expected, "shape", None)
