"""The synthetic world as training data: pictures, and token ids of their captions."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from seg4diff_jax.data.loader import Item
from seg4diff_jax.data.shapes import scene
from seg4diff_jax.text import Tokenizers, tokenize


@dataclass(frozen=True)
class SceneConfig:
    """Which scenes.

    Attributes:
      size: side of the pictures in pixels.
      train, validation: number of scenes of each split.
    """

    size: int = 128
    train: int = 1_000_000
    validation: int = 256


class SceneItems:
    """Scenes of a split: `image` uint8 [size, size, 3] and, with tokenizers, `clip_l` and `clip_g` int32 [tokens]."""

    def __init__(self, split: str, count: int, size: int, tokenizers: Tokenizers | None = None):
        self.split, self.count, self.size, self.tokenizers = split, count, size, tokenizers

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Item:
        shown = scene(self.split, index, self.size)
        if self.tokenizers is None:
            return {"image": shown.image}
        return {"image": shown.image, **caption_ids(self.tokenizers, shown.caption)}


def caption_ids(tokenizers: Tokenizers, caption: str) -> Item:
    ids = tokenize(tokenizers, [caption])
    return {"clip_l": np.asarray(ids.clip_l)[0], "clip_g": np.asarray(ids.clip_g)[0]}


def to_model_range(image: UInt8[Array, "*batch height width 3"]) -> Float[Array, "*batch height width 3"]:
    """Pixels in 0..255 to -1..1, on the device."""
    return image.astype(jnp.float32) / 127.5 - 1


def scene_name(split: str):
    return f"{split} scene {{}}".format
