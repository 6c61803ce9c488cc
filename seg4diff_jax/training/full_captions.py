"""Captions that fill their prompt: class names follow them, over and over, where padding would be.

A caption takes a handful of the text tokens, and among hundreds of image tokens and paddings an untrained attention
hardly meets it. In a prompt full of names it does, and so learns sooner what each name looks like.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Integer

from seg4diff_jax.data.loader import Item, Source
from seg4diff_jax.data.shapes import CLASSES
from seg4diff_jax.text import Tokenizers
from seg4diff_jax.training.scenes import caption_ids


class NameFiller:
    """Fills token ids up with the names of the classes that are shown.

    Args:
      tokenizers: for which every class name is one token.
      share: of the prompts that are filled; the others keep their padding, which a prompt for masks has too.
    """

    def __init__(self, tokenizers: Tokenizers, share: float):
        self.share = share
        self.ends = {name: int(ids[1]) for name, ids in caption_ids(tokenizers, "").items()}
        tokens = caption_ids(tokenizers, " ".join(CLASSES))
        if any(ids[1 + len(CLASSES)] != self.ends[name] for name, ids in tokens.items()):
            raise ValueError("the tokenizers split class names: expected one token for each")
        self.names = {name: ids[1 : 1 + len(CLASSES)] for name, ids in tokens.items()}

    def __call__(self, ids: Item, shown: Integer[np.ndarray, " classes"], random: np.random.Generator) -> Item:
        """
        Args:
          ids: tokens of one prompt by tokenizer, each [tokens]: start, words, end, padding. A prompt that is cut off
            before its end has no room, and is returned as it is.
          shown: numbers of the classes that the picture shows, at least one.
        """
        if random.random() >= self.share:
            return ids
        length = len(next(iter(ids.values())))
        rounds = -(-length // len(shown))
        order = np.concatenate([random.permutation(shown) for _ in range(rounds)])

        def filled(name: str, tokens: np.ndarray) -> np.ndarray:
            if self.ends[name] not in tokens:
                return tokens
            words = np.argmax(tokens == self.ends[name])
            body = np.concatenate([tokens[:words], self.names[name][order]])[: length - 1]
            return np.append(body, self.ends[name]).astype(tokens.dtype)

        return {name: filled(name, tokens) for name, tokens in ids.items()}


class FullCaptions:
    """Items whose prompts are filled; which, and in what order, is a function of an item's number alone.

    Args:
      items: with `labels` [height, width], and token ids `clip_l` and `clip_g` [tokens].
    """

    def __init__(self, items: Source, filler: NameFiller):
        self.items, self.filler = items, filler

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int, /) -> Item:
        item = self.items[index]
        ids = {name: item[name] for name in ("clip_l", "clip_g")}
        return {**item, **self.filler(ids, np.unique(item["labels"]), np.random.default_rng(index))}
