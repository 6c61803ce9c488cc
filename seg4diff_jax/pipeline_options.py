"""What `Pipeline`'s methods can be told by name: for editors, which complete these, and for type checkers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypedDict

from seg4diff_jax.images import Resize
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.segmentation.unsupervised import MinMax


class SegmentOptions(TypedDict, total=False):
    """Of `Pipeline.segment`, which says what they mean."""

    block: int | None
    step: int | None
    seed: int | Sequence[int]
    noise: Any
    size: tuple[int, int] | None
    resize: Resize
    kernel: Kernel | None


class UnsupervisedOptions(SegmentOptions, total=False):
    """Of `Pipeline.segment_unsupervised`."""

    threshold: float | None
    minmax: MinMax


class AttentionOptions(TypedDict, total=False):
    """Of `Pipeline.attention`."""

    blocks: int | Collection[int] | None
    step: int | None
    seed: int
    noise: Any
    size: tuple[int, int] | None
    resize: Resize
    request: AttentionRequest | None
    kernel: Kernel | None
