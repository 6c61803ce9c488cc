"""Maps of one word from several sides: by head, by block, by block and noise level, in both directions; and of pads.

Seg4Diff, figures 9, 16, 25 to 27 and 30: single heads take parts and their mean the whole, the attention of image
tokens to a word is fuller than that of the word to the image, and pad tokens of an empty prompt take regions. What is
looked at is a noised image, or the run that generates a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Unpack

import numpy as np
from jaxtyping import Float, UInt8

from seg4diff_jax.analysis.generating_records import generating_records
from seg4diff_jax.images import ImageInput, read_image
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.pipeline_options import RunOptions
from seg4diff_jax.prompt_attention import PromptAttention, prompt_attention

HEADS_KEPT, HEADS_AVERAGED = AttentionRequest(scores=False), AttentionRequest(scores=False, mean_heads=True)
BOTH_WAYS = AttentionRequest(("image_to_text", "text_to_image"), scores=False, mean_heads=True)
LEVELS = 1, 8, 15, 22, 28
"""Noise levels of `by_levels`, from nearly clean to pure noise."""
Records = Mapping[int, PromptAttention]
"""By block."""


class View(NamedTuple):
    """A map of image tokens and what it is of."""

    title: str
    map: Float[np.ndarray, "rows columns"]


class Seen(NamedTuple):
    """A picture, and what attention was read of it: records by noise level, then by block."""

    picture: UInt8[np.ndarray, "height width 3"]
    levels: Mapping[int, Records]

    @property
    def records(self) -> Records:
        """Those of the first level."""
        return next(iter(self.levels.values()))


def seen_in_image(
    pipe: Pipeline,
    image: ImageInput,
    prompt: str,
    request: AttentionRequest,
    *,
    blocks: Sequence[int],
    levels: Sequence[int],
    seed: int = 0,
) -> Seen:
    """Reads blocks on an image at noise levels, counted from the clean end of 28: a pass for each.

    Raises as `Pipeline.attention`; FloatingPointError for maps that are not finite.
    """
    pixels = read_image(image)
    of_level = lambda level: pipe.attention(pixels, prompt, blocks=blocks, step=level, seed=seed, request=request)
    return _finite(Seen(pixels, {level: of_level(level) for level in levels}))


def seen_while_generating(
    pipe: Pipeline,
    prompt: str,
    request: AttentionRequest,
    *,
    blocks: Sequence[int],
    levels: Sequence[int],
    **options: Unpack[RunOptions],
) -> Seen:
    """Reads blocks in the run that generates a picture, in one run for all levels.

    Arguments and errors are those of `generating_records`; FloatingPointError for maps that are not finite.
    """
    found = generating_records(pipe, prompt, request, blocks=blocks, levels=levels, **options)
    texts, told = pipe.encode_prompts([prompt]), {0: prompt}
    known = lambda records: prompt_attention(records, told, texts, pipe.tokenizers, found.grid, request)[0]
    return _finite(Seen(found.picture, {level: known(records) for level, records in found.levels.items()}))


def by_heads(record: PromptAttention, word: str) -> list[View]:
    """Returns the mean map of all heads of a block, then that of each head. Raises as `PromptAttention.of`."""
    heads = np.asarray(record.probs)[0][..., record.columns(word)].mean(axis=-1).reshape(-1, *record.grid)
    return [View("mean of heads", heads.mean(axis=0)), *(View(f"head {i}", each) for i, each in enumerate(heads))]


def by_blocks(records: Records, word: str) -> list[View]:
    """Returns the map of every block, averaged over heads. Raises as `PromptAttention.of`."""
    return [View(f"block {block}", np.asarray(record.of(word))) for block, record in records.items()]


def by_levels(levels: Mapping[int, Records], word: str) -> list[View]:
    """Returns the maps of every block at each noise level, level by level. Raises as `PromptAttention.of`."""
    each = [(level, view) for level, records in levels.items() for view in by_blocks(records, word)]
    return [View(f"level {level}, {view.title}", view.map) for level, view in each]


def both_directions(records: Records, word: str) -> list[View]:
    """Returns the attention of the image to a word (I2T) and of the word to the image (T2I) for every block.

    Each is the mean over heads and the word's tokens. Raises as `PromptAttention.of`.
    """
    views = []
    for block, record in records.items():
        assert record.text_to_image is not None
        from_word = np.asarray(record.text_to_image.probs)[0, record.columns(word)].mean(axis=0)
        views.append(View(f"block {block}, image to word", np.asarray(record.of(word))))
        views.append(View(f"block {block}, word to image", from_word.reshape(record.grid)))
    return views


def of_pads(record: PromptAttention) -> list[View]:
    """Returns the maps of an empty prompt's CLIP tokens in a block: start, end and every pad, averaged over heads."""
    maps = np.moveaxis(np.asarray(record.probs)[0], -1, 0).reshape(-1, *record.grid)
    names = ["start", "end", *(f"pad {number}" for number in range(1, len(maps) - 1))]
    return [View(name, each) for name, each in zip(names, maps, strict=True)]


def _finite(seen: Seen) -> Seen:
    for records in seen.levels.values():
        for block, record in records.items():
            if not np.isfinite(np.asarray(record.probs)).all():
                raise FloatingPointError(f"attention of block {block} is not finite: damaged weights or inputs")
    return seen
