"""Seg4Diff in JAX: Stable Diffusion 3's joint attention as a zero-shot open-vocabulary segmenter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seg4diff_jax.checkpoints import load, open
    from seg4diff_jax.pipeline import Pipeline, Segmentation, UnsupervisedSegmentation

__all__ = ["Pipeline", "Segmentation", "UnsupervisedSegmentation", "load", "open"]


def __dir__() -> list[str]:
    """Also what has not been asked for yet."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    # On demand: the data readers' worker processes and `--help` need neither JAX nor the models.
    if name in ("load", "open"):
        from seg4diff_jax import checkpoints

        return getattr(checkpoints, name)
    if name in __all__:
        from seg4diff_jax import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
