"""Small tokenizers with the file formats, special tokens and text cleaning of SD3's three, trained on a few words."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import sentencepiece

from seg4diff_jax.miniature.tokenizer import learn_merges, vocabulary, write_tokenizer

TEXT = """
a an the of and in on with at photo photograph picture painting drawing two three small large red green blue white black
bicycle bird boat bottle bus car cat chair cow dog horse motorbike person sheep sofa train background wall building sky
floor tree ceiling road bed grass cabinet sidewalk earth door table mountain plant curtain water sea traffic light sign
fence pole vegetation terrain rider truck motorcycle chest drawers
"""
WORDS = TEXT.split()
"""Each becomes one token of the CLIP vocabulary; any other word becomes several."""
T5_SENTINELS = 100


@cache
def clip_merges() -> tuple[tuple[str, str], ...]:
    return tuple(learn_merges(WORDS))


def clip_vocabulary() -> dict[str, int]:
    return vocabulary(clip_merges())


def write_clip_tokenizer(directory: Path, *, pad_token: str) -> None:
    write_tokenizer(directory, clip_merges(), pad_token=pad_token)


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
