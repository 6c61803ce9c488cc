"""The keyword arguments of `Pipeline`'s methods: types for editors and type checkers, and checks of blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, Required, TypedDict

import numpy as np
from jaxtyping import UInt8

from seg4diff_jax.flow import Sampler, is_whole
from seg4diff_jax.images import Resize
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.segmentation.open_vocabulary import Segmentation
from seg4diff_jax.segmentation.unsupervised import MinMax

Picture = UInt8[np.ndarray, "height width 3"]
PictureWithMasks = tuple[Picture, Segmentation]


class SegmentOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.segment`, whose docstring explains them."""

    block: int | None
    step: int | None
    seed: int | Sequence[int]
    noise: Any
    size: tuple[int, int] | None
    resize: Resize
    kernel: Kernel | None


class UnsupervisedOptions(SegmentOptions, total=False):
    """Keyword arguments of `Pipeline.segment_unsupervised`, whose docstring explains them."""

    threshold: float | None
    minmax: MinMax


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.attention`, whose docstring explains them."""

    blocks: int | Collection[int] | None
    step: int | None
    seed: int
    noise: Any
    size: tuple[int, int] | None
    resize: Resize
    request: AttentionRequest | None
    kernel: Kernel | None


class RunOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.generate`, whose docstring explains them, but for those of masks."""

    negative_prompt: str
    steps: int
    guidance: float
    seed: int
    noise: Any
    size: tuple[int, int] | None
    sampler: Sampler | None
    kernel: Kernel | None


class GenerateOptions(RunOptions, total=False):
    """Those of one picture without masks."""

    images_per_prompt: Literal[1]
    segment: None


class ManyOptions(RunOptions, total=False):
    """Those of several pictures without masks."""

    images_per_prompt: int
    segment: None


class MasksOptions(RunOptions, total=False):
    """Those of one picture with masks."""

    images_per_prompt: Literal[1]
    segment: Required[Sequence[str]]
    block: int | None
    at_step: int | None


class ManyMasksOptions(RunOptions, total=False):
    """Those of several pictures with masks."""

    images_per_prompt: int
    segment: Required[Sequence[str] | Sequence[Sequence[str]]]
    block: int | None
    at_step: int | None


def checked_block(block: int | None, expert: int | None, depth: int) -> int:
    """Returns the block to read: the one that is named, or else the checkpoint's expert block.

    Raises ValueError if neither is known, or the transformer, of which `depth` blocks are loaded, has no such block.
    """
    chosen = expert if block is None else block
    if chosen is None:
        raise ValueError("this checkpoint does not say which block segments best: name one with block=")
    if not is_whole(chosen, 0, depth - 1):
        whose = ", the checkpoint's own," if block is None else ""
        raise ValueError(
            f"block{whose} is {chosen!r}; the loaded transformer has blocks 0..{depth - 1}"
            + (f": load with blocks={chosen + 1} or more, or name one with block=" if block is None else "")
        )
    return int(chosen)


def checked_blocks(blocks: int | Collection[int] | None, depth: int) -> tuple[int, ...]:
    """Returns the numbers of the blocks to read, each once, in order. Default: all that are loaded.

    Raises as `checked_block` does.
    """
    if blocks is None:
        return tuple(range(depth))
    several = (blocks,) if isinstance(blocks, int | np.integer) else blocks
    return tuple(sorted({checked_block(block, None, depth) for block in several}))
