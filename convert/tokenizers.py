"""Checks a checkpoint's tokenizers against the text encoders that take their ids."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from seg4diff_jax.convert.components import tokenizers_of
from seg4diff_jax.convert.errors import CheckpointError, raise_all
from seg4diff_jax.convert.families import SD3
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.readers import Source
from seg4diff_jax.quoting import quoted
from seg4diff_jax.text import Tokenizers, load_tokenizer, load_tokenizers

JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "tokenizer.json")
FOLDERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def check_tokenizers(source: Source) -> None:
    """Raises CheckpointError when tokenizers of `source` are damaged or do not fit. Some may be absent."""
    if {"tokenizer", "tokenizer_2"} <= source.tokenizers.keys():
        open_tokenizers(source, t5="tokenizer_3" in source.tokenizers)
        return
    _check_json(source)
    try:
        for name, folder in source.tokenizers.items():
            load_tokenizer(name, folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source.origin}: {error}") from error


def open_tokenizers(source: Source, *, t5: bool) -> Tokenizers:
    """Returns the tokenizers of `source`, with T5's if `t5` is True.

    Raises CheckpointError when they are damaged or do not fit the text encoders. Without this check JAX would read past
    the end of an embedding without an error.
    """
    _check_json(source)
    try:
        tokenizers = load_tokenizers(source.tokenizers, t5=t5)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source.origin}: {error}") from error
    problems = [
        problem
        for folder, tokenizer in zip(FOLDERS, tokenizers, strict=True)
        if tokenizer is not None and (problem := _unmerged(source.tokenizers[folder], tokenizer.all_special_tokens))
    ]
    for name, tokenizer in zip((*SD3.clips, SD3.t5), tokenizers, strict=True):
        if tokenizer is None or name not in source.configs:
            continue
        config = source.parsed[name]
        both = f"{source.tokenizers[str(tokenizers_of([name])[0])]} does not fit {source.origin}/{name}"
        if (ids := max(tokenizer.get_vocab().values()) + 1) > config.vocab_size:
            problems.append(f"{both}: it makes ids up to {ids - 1}, the encoder embeds {config.vocab_size}")
        positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)  # T5's are relative
        if tokenizer.model_max_length > positions:
            problems.append(
                f"{both}: its model_max_length is {tokenizer.model_max_length}, the encoder has {positions} positions"
            )
    raise_all(problems, f"{source.origin}: tokenizers of another model")
    return tokenizers


def _check_json(source: Source) -> None:
    for folder in source.tokenizers.values():
        for file in JSON:
            if (folder / file).is_file():
                read_json(folder / file)


def _unmerged(folder: Path, special: Collection[str]) -> str | None:
    """Returns what is wrong with `merges.txt`, or None.

    A word without the merge that makes it would be split into smaller tokens, without an error.
    """
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not vocabulary.is_file() or not merges.is_file():
        return None
    made = {
        "".join(pair) for line in merges.read_text("utf-8", "replace").splitlines() if len(pair := line.split(" ")) == 2
    }
    words = (word for word in read_json(vocabulary) if len(word.removesuffix("</w>")) > 1 and word not in special)
    if lacking := [word for word in words if word not in made]:
        return f"{merges}: {len(lacking)} words of vocab.json are made by no merge, as {quoted(lacking[0])}; copy it"
    return None
