"""Small tokenizers with the file formats, special tokens and text cleaning of SD3's three, trained on a few words."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = """
a an the of and in on with at photo photograph picture painting drawing two three small large red green blue white black
bicycle bird boat bottle bus car cat chair cow dog horse motorbike person sheep sofa train background wall building sky
floor tree ceiling road bed grass cabinet sidewalk earth door table mountain plant curtain water sea traffic light sign
fence pole vegetation terrain rider truck motorcycle chest drawers
"""
WORDS = TEXT.split()
"""Each becomes one token of the CLIP vocabulary; any other word becomes several."""
MERGES = 230
START, END = "<|startoftext|>", "<|endoftext|>"
T5_SENTINELS = 100


def _byte_characters() -> list[str]:
    """One printable character per byte, in the order of CLIP's vocabulary: `!` is first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@cache
def clip_merges() -> tuple[tuple[str, str], ...]:
    """Pairs to merge, most frequent first. The first words of the list count as the most frequent."""
    model = models.BPE(end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = _byte_characters()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + MERGES,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    text = [" ".join([word] * (len(WORDS) + 2 - rank)) for rank, word in enumerate(WORDS)]
    tokenizer.train_from_iterator(text, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tuple((left, right) for left, right in merges[:MERGES])


@cache
def clip_vocabulary() -> dict[str, int]:
    """Bytes, bytes that end a word, merges, start, end: so the end token has the largest id, as in CLIP."""
    characters = _byte_characters()
    tokens = [*characters, *(character + "</w>" for character in characters)]
    tokens += [left + right for left, right in clip_merges()]
    return {token: number for number, token in enumerate([*tokens, START, END])}


def write_clip_tokenizer(directory: Path, *, pad_token: str) -> None:
    """`vocab.json`, `merges.txt` and the two configuration files."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = clip_vocabulary()
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in clip_merges())])
    (directory / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": pad_token, "unk_token": END}
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    added = {
        str(vocabulary[token]): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in {pad_token: None, START: None, END: None}
    }
    config = special | {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


@cache
def _t5_model() -> bytes:
    model = io.BytesIO()
    text = [f"{first} {second}" for first, second in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="unigram",
        vocab_size=96,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def t5_vocabulary_size() -> int:
    processor = sentencepiece.SentencePieceProcessor(model_proto=_t5_model())
    return processor.vocab_size() + T5_SENTINELS


def write_t5_tokenizer(directory: Path) -> None:
    """`spiece.model` and the two configuration files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "spiece.model").write_bytes(_t5_model())
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = special | {
        "clean_up_tokenization_spaces": True,
        "extra_ids": T5_SENTINELS,
        "model_max_length": 512,
        "tokenizer_class": "T5Tokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
