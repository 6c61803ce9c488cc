"""Makes training prompts from captions: shortens them, and replaces padding by class names.

A caption is only a few tokens among hundreds of image and padding tokens, so an untrained model gives it little
attention. In a prompt full of class names, words get more attention, and the model learns sooner what each name looks
like.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from seg4diff_jax.checked import Checked
from seg4diff_jax.data.loader import DataSource, Item
from seg4diff_jax.miniature.scenes import caption_ids
from seg4diff_jax.miniature.world.shapes import CLASSES
from seg4diff_jax.text import Tokenizers


@dataclass(frozen=True)
class Prompts(Checked):
    """Settings for making prompts from captions.

    Attributes:
      tokens: how many of SD3's 77 text tokens are kept; longer captions are cut off.
      filled: share of the prompts whose padding is replaced by names of the picture's classes. The other prompts keep
        their padding, which prompts for masks have too.
    """

    tokens: int = 77
    filled: float = 0.0

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        found = []
        if not 3 <= self.tokens <= 77:
            found.append(f"prompts.tokens is {self.tokens}; expected 3 to 77: start, words, end")
        if not 0 <= self.filled <= 1:
            found.append(f"prompts.filled is {self.filled}; expected a share of the captions, 0 to 1")
        return found


class PromptItems:
    """A data source whose captions have become prompts. A prompt depends on its item and the item's index alone.

    Args:
      items: items with token ids `clip_l` and `clip_g` [77]: start, words, end, padding; and with `labels` [height,
        width] if prompts are filled.
      tokenizers: tokenizers in which every class name is one token.
    """

    def __init__(self, items: DataSource, prompts: Prompts, tokenizers: Tokenizers):
        self.items, self.prompts = items, prompts
        # The empty prompt is start, end, padding; this is its end and padding.
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
        """Returns the caption's words, names of classes, end and padding, cut off to the number of tokens."""
        ends = self.ends[name]
        words = ids[: np.argmax(ids == ends[0])]
        words = np.concatenate([words, self.names[name][filling]])[: self.prompts.tokens - 1]
        return np.concatenate([words, ends])[: self.prompts.tokens].astype(ids.dtype)
