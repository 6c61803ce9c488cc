"""A checkpoint's tokenizers, held against the text encoders that take their ids."""

from __future__ import annotations

from convert.components import COMPONENTS, parse_config
from convert.errors import CheckpointError, raise_all
from convert.readers import Source
from seg4diff_jax.text import Tokenizers, load_tokenizers


def open_tokenizers(source: Source, *, t5: bool) -> Tokenizers:
    """The tokenizers of `source`; `t5`: T5's too.

    Raises CheckpointError when they are damaged or do not fit the text encoders: JAX would read past the end of an
    embedding without a word.
    """
    try:
        tokenizers = load_tokenizers(source.tokenizers, t5=t5)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source.origin}: {error}") from error
    problems = []
    for name, tokenizer in zip(("text_encoder", "text_encoder_2", "text_encoder_3"), tokenizers, strict=True):
        if tokenizer is None or name not in source.configs:
            continue
        config = parse_config(name, source.configs[name])
        both = f"{source.tokenizers[str(COMPONENTS[name].tokenizer)]} does not fit {source.origin}/{name}"
        if (ids := max(tokenizer.get_vocab().values()) + 1) > config.vocab_size:
            problems.append(f"{both}: it makes ids up to {ids - 1}, the encoder embeds {config.vocab_size}")
        positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)  # T5's are relative
        if tokenizer.model_max_length > positions:
            problems.append(
                f"{both}: its model_max_length is {tokenizer.model_max_length}, the encoder has {positions} positions"
            )
    raise_all(problems, f"{source.origin}: tokenizers of another model")
    return tokenizers
