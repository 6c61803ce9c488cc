"""Seg4Diff in JAX: Stable Diffusion 3's joint attention as a zero-shot open-vocabulary segmenter."""

from seg4diff_jax.pipeline import Pipeline, Segmentation, load

__all__ = ["Pipeline", "Segmentation", "load"]
