"""Maps of one word from several sides: by head, by block, by block and noise level, in both directions; and of pads.

Seg4Diff, figures 9, 16, 25 to 27 and 30: single heads take parts and their mean the whole, the attention of image
tokens to a word is fuller than that of the word to the image, and pad tokens of an empty prompt take regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from seg4diff_jax.images import ImageInput
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.prompt_attention import PromptAttention

HEADS_KEPT, HEADS_AVERAGED = AttentionRequest(scores=False), AttentionRequest(scores=False, mean_heads=True)
BOTH_WAYS = AttentionRequest(("image_to_text", "text_to_image"), scores=False, mean_heads=True)
LEVELS = 1, 8, 15, 22, 28
"""Noise levels of `by_levels`, from nearly clean to pure noise."""


class View(NamedTuple):
    """A map of image tokens and what it is of."""

    title: str
    map: Float[np.ndarray, "rows columns"]


class Seen(NamedTuple):
    """An image under a prompt, one of whose words is looked at. Block, noise level and seed as in `Pipeline.attention`.

    Attributes:
      word: a word of the prompt, or several that follow one another.
    """

    image: ImageInput
    prompt: str
    word: str
    step: int | None = None
    seed: int = 0


def by_heads(pipe: Pipeline, seen: Seen, block: int) -> list[View]:
    """Returns the mean map of all heads of a block, then that of each head. Raises as `PromptAttention.of`."""
    record = _records(pipe, seen, HEADS_KEPT, [block])[block]
    heads = np.asarray(record.probs)[0][..., record.columns(seen.word)].mean(axis=-1).reshape(-1, *record.grid)
    return [View("mean of heads", heads.mean(axis=0)), *(View(f"head {i}", each) for i, each in enumerate(heads))]


def by_blocks(pipe: Pipeline, seen: Seen) -> list[View]:
    """Returns the map of every block, averaged over heads. Raises as `PromptAttention.of`."""
    records = _records(pipe, seen, HEADS_AVERAGED)
    return [View(f"block {block}", np.asarray(record.of(seen.word))) for block, record in records.items()]


def by_levels(pipe: Pipeline, seen: Seen, levels: Sequence[int] = LEVELS) -> list[View]:
    """Returns the maps of every block at each noise level, level by level. Raises as `PromptAttention.of`."""
    views = [(level, by_blocks(pipe, seen._replace(step=level))) for level in levels]
    return [View(f"level {level}, {view.title}", view.map) for level, each in views for view in each]


def both_directions(pipe: Pipeline, seen: Seen) -> list[View]:
    """Returns the attention of the image to a word (I2T) and of the word to the image (T2I) for every block.

    Each is the mean over heads and the word's tokens. Raises as `PromptAttention.of`.
    """
    views = []
    for block, record in _records(pipe, seen, BOTH_WAYS).items():
        assert record.text_to_image is not None
        from_word = np.asarray(record.text_to_image.probs)[0, record.columns(seen.word)].mean(axis=0)
        views.append(View(f"block {block}, image to word", np.asarray(record.of(seen.word))))
        views.append(View(f"block {block}, word to image", from_word.reshape(record.grid)))
    return views


def of_pads(pipe: Pipeline, image: ImageInput, block: int, step: int | None = None, seed: int = 0) -> list[View]:
    """Returns the maps of an empty prompt's CLIP tokens in a block: start, end and every pad, averaged over heads."""
    record = _records(pipe, Seen(image, "", "", step, seed), HEADS_AVERAGED, [block])[block]
    maps = np.moveaxis(np.asarray(record.probs)[0], -1, 0).reshape(-1, *record.grid)
    names = ["start", "end", *(f"pad {number}" for number in range(1, len(maps) - 1))]
    return [View(name, each) for name, each in zip(names, maps, strict=True)]


def _records(
    pipe: Pipeline, seen: Seen, request: AttentionRequest, blocks: Sequence[int] | None = None
) -> dict[int, PromptAttention]:
    """Of all loaded blocks by default. Raises FloatingPointError for maps that are not finite."""
    records = pipe.attention(seen.image, seen.prompt, blocks=blocks, step=seen.step, seed=seen.seed, request=request)
    for block, record in records.items():
        if not np.isfinite(np.asarray(record.probs)).all():
            raise FloatingPointError(f"attention of block {block} is not finite: damaged weights or inputs")
    return records
