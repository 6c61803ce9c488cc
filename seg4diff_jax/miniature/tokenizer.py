"""The miniature's tokenizers: CLIP's byte-pair format, with merges learnt from the words of the synthetic world.

Every word of that world is one token. Any other text is split into pieces, down to single bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from seg4diff_jax.miniature.world.captions import words
from seg4diff_jax.miniature.world.shapes import CLASSES

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
LENGTH = 77
"""Number of tokens of a prompt, start, end and padding included, as in SD3."""
PADS = {"tokenizer": END, "tokenizer_2": "!"}
"""Padding token of each tokenizer, as in SD3, whose two CLIP tokenizers pad differently."""

Pair = tuple[str, str]


def byte_characters() -> list[str]:
    """Returns one printable character for each byte, in the order of CLIP's vocabulary: `!` is first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def learn_merges(lexicon: Iterable[str]) -> list[Pair]:
    """Learns byte-pair merges (Sennrich et al. 2016) that make each word one token. Returns them in order of learning.

    The pair with the highest count is merged first; among equal counts, the first in alphabetical order. Words are
    ASCII.
    """
    pieces = [[*word[:-1], word[-1] + END_OF_WORD] for word in dict.fromkeys(lexicon)]
    merges: list[Pair] = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merged(word, best) for word in pieces]
    return merges


def _merged(pieces: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def vocabulary(merges: Sequence[Pair]) -> dict[str, int]:
    """Returns the id of each token: bytes, bytes that end a word, merges, start, end.

    The end token has the largest id, as in CLIP.
    """
    characters = byte_characters()
    tokens = [*characters, *(character + END_OF_WORD for character in characters)]
    tokens += [left + right for left, right in merges]
    return {token: number for number, token in enumerate([*tokens, START, END])}


def write_tokenizer(directory: str | Path, merges: Sequence[Pair], *, pad_token: str) -> None:
    """Writes a directory that transformers' CLIPTokenizer reads: vocabulary, merges and two configuration files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ids = vocabulary(merges)
    special = {"bos_token": START, "eos_token": END, "pad_token": pad_token, "unk_token": END}
    kept = dict.fromkeys((pad_token, START, END))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    config = special | {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(ids[token]): {"content": token} | flags for token in kept},
        "clean_up_tokenization_spaces": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    files = {
        "vocab.json": json.dumps(ids, ensure_ascii=False),
        "merges.txt": "\n".join(lines) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


def write_tokenizers(directory: str | Path) -> None:
    """Writes the miniature's `tokenizer` and `tokenizer_2` into a checkpoint's directory."""
    merges = learn_merges(words(CLASSES))
    for name, pad_token in PADS.items():
        write_tokenizer(Path(directory) / name, merges, pad_token=pad_token)
