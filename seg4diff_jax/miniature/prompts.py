"""What a training step reads of its captions: how many tokens, and class names where padding would be.

A caption takes a handful of the text tokens, and among hundreds of image tokens and paddings an untrained attention
hardly meets it. In a prompt full of names it does, and so learns sooner what each name looks like.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from seg4diff_jax.data.loader import DataSource, Item
from seg4diff_jax.miniature.scenes import caption_ids
from seg4diff_jax.miniature.world.shapes import CLASSES
from seg4diff_jax.text import Tokenizers


@dataclass(frozen=True)
class Prompts:
    """How captions become prompts.

    Attributes:
      tokens: how many of SD3's 77 text tokens are kept; a longer caption is cut off.
      filled: share of the prompts that names of the classes shown fill up to the end; the others keep their padding,
        which a prompt for masks has too.
    """

    tokens: int = 77
    filled: float = 0.0

    def __post_init__(self):
        if found := self.problems():
            raise ValueError("\n".join(found))

    def problems(self) -> list[str]:
        """What does not fit, a sentence each."""
        found = []
        if not 3 <= self.tokens <= 77:
            found.append(f"prompts.tokens is {self.tokens}; expected 3 to 77: start, words, end")
        if not 0 <= self.filled <= 1:
            found.append(f"prompts.filled is {self.filled}; expected a share of the captions, 0 to 1")
        return found


class PromptItems:
    """Items whose captions have become prompts; a prompt is a function of its item's number alone.

    Args:
      items: with token ids `clip_l` and `clip_g` [77]: start, words, end, padding; and `labels` [height, width] if
        prompts are to be filled.
      tokenizers: for which every class name is one token.
    """

    def __init__(self, items: DataSource, prompts: Prompts, tokenizers: Tokenizers):
        self.items, self.prompts = items, prompts
        # The empty prompt is start, end, padding.
        self.ends = {name: ids[1:] for name, ids in caption_ids(tokenizers, "").items()}
        every = {name: ids[1:] for name, ids in caption_ids(tokenizers, " ".join(CLASSES)).items()}
        if any(ids[len(CLASSES)] != self.ends[name][0] for name, ids in every.items()):
            raise ValueError("the tokenizers split class names: expected one token for each")
        self.names = {name: ids[: len(CLASSES)] for name, ids in every.items()}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int, /) -> Item:
        item, random = self.items[index], np.random.default_rng(index)
        filling = np.zeros(0, int)
        if random.random() < self.prompts.filled:
            shown = np.unique(item["labels"])
            rounds = -(-self.prompts.tokens // len(shown))
            filling = np.concatenate([random.permutation(shown) for _ in range(rounds)])
        return {**item, **{name: self._prompt(name, item[name], filling) for name in self.names}}

    def _prompt(
        self, name: str, ids: Integer[np.ndarray, " tokens"], filling: Integer[np.ndarray, " names"]
    ) -> Integer[np.ndarray, " kept"]:
        """The caption's words, names of classes, end, padding: the first of them that there is room for."""
        ends = self.ends[name]
        words = ids[: np.argmax(ids == ends[0])]
        words = np.concatenate([words, self.names[name][filling]])[: self.prompts.tokens - 1]
        return np.concatenate([words, ends])[: self.prompts.tokens].astype(ids.dtype)
