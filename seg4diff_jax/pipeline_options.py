"""The keyword arguments of `Pipeline`'s methods as types, for editors and type checkers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypedDict

from seg4diff_jax.images import Resize
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.segmentation.unsupervised import MinMax


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
