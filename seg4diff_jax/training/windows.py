"""Windows of cached scenes, as a cheap first stage of flow matching: few tokens, few classes.

A window's caption is the bare names of the classes in it, in any order; the full scenes' sentences come later.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seg4diff_jax.data.loader import Item, Source
from seg4diff_jax.data.shapes import CLASSES
from seg4diff_jax.text import Tokenizers
from seg4diff_jax.training.full_captions import NameFiller
from seg4diff_jax.training.scenes import caption_ids

SMALLEST_SHARE = 0.03
"""Of a window's pixels: what shows less of itself is not named."""


@dataclass(frozen=True)
class Window:
    """Which windows.

    Attributes:
      side: in latents.
      per_scene: how many are taken of each scene.
      text_tokens: how many tokens of a prompt are kept: captions are short, and the rest would be padding.
    """

    side: int
    per_scene: int = 8
    text_tokens: int = 16


class Windows:
    """Windows at random places, each a function of its number alone.

    Args:
      scenes: items with `latents` [rows, columns, channels] and `labels` [height, width].
      filler: of the room that captions leave.
    """

    def __init__(self, scenes: Source, window: Window, tokenizers: Tokenizers, filler: NameFiller):
        self.scenes, self.window, self.tokenizers, self.filler = scenes, window, tokenizers, filler

    def __len__(self) -> int:
        return len(self.scenes) * self.window.per_scene

    def __getitem__(self, index: int, /) -> Item:
        scene, side = self.scenes[index // self.window.per_scene], self.window.side
        latents, labels = scene["latents"], scene["labels"]
        random = np.random.default_rng(index)
        top, left = (int(random.integers(size - side + 1)) for size in latents.shape[:2])
        factor = len(labels) // len(latents)
        shown = labels[top * factor : (top + side) * factor, left * factor : (left + side) * factor]
        counts = np.bincount(shown.ravel(), minlength=len(CLASSES))
        present = random.permutation(np.flatnonzero(counts >= SMALLEST_SHARE * shown.size))
        caption = " ".join(CLASSES[number] for number in present)
        ids = {
            name: tokens[: self.window.text_tokens] for name, tokens in caption_ids(self.tokenizers, caption).items()
        }
        return {"latents": latents[top : top + side, left : left + side], **self.filler(ids, present, random)}
