"""Seg4Diff in JAX: Stable Diffusion 3's joint attention as a zero-shot open-vocabulary segmenter."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seg4diff_jax.checkpoints import Checkpoint, load, open
    from seg4diff_jax.class_names import OneClassWarning
    from seg4diff_jax.class_priors import measure_class_prior, read_class_prior
    from seg4diff_jax.convert.errors import CheckpointError
    from seg4diff_jax.data.errors import FolderError
    from seg4diff_jax.image_files import ImageError
    from seg4diff_jax.models.attention import AttentionRequest, JointAttention
    from seg4diff_jax.models.kernels import Kernel
    from seg4diff_jax.models.perturbation import Blur, Perturbation, skip_layers
    from seg4diff_jax.parallel import make_mesh
    from seg4diff_jax.pipeline import Pipeline, PromptAttention, Segmentation, UnsupervisedSegmentation
    from seg4diff_jax.reporting.drawings import draw_maps, draw_masks, draw_words
    from seg4diff_jax.segmentation.class_prior import ClassPrior
    from seg4diff_jax.segmentation.mask_options import MaskOptions

__all__ = [
    "AttentionRequest",
    "Blur",
    "Checkpoint",
    "CheckpointError",
    "ClassPrior",
    "FolderError",
    "ImageError",
    "JointAttention",
    "Kernel",
    "MaskOptions",
    "OneClassWarning",
    "Perturbation",
    "Pipeline",
    "PromptAttention",
    "Segmentation",
    "UnsupervisedSegmentation",
    "__version__",
    "draw_maps",
    "draw_masks",
    "draw_words",
    "load",
    "make_mesh",
    "measure_class_prior",
    "open",
    "read_class_prior",
    "skip_layers",
]

try:
    __version__ = version("seg4diff-jax")
except PackageNotFoundError:  # a clone that is not installed
    __version__ = "0+unknown"

# On demand: the data readers' worker processes and `--help` need neither JAX nor the models.
_HOMES = {
    "checkpoints": ("Checkpoint", "load", "open"),
    "class_names": ("OneClassWarning",),
    "class_priors": ("measure_class_prior", "read_class_prior"),
    "convert.errors": ("CheckpointError",),
    "data.errors": ("FolderError",),
    "image_files": ("ImageError",),
    "models.attention": ("AttentionRequest", "JointAttention"),
    "models.kernels": ("Kernel",),
    "models.perturbation": ("Blur", "Perturbation", "skip_layers"),
    "parallel": ("make_mesh",),
    "pipeline": ("Pipeline", "PromptAttention", "Segmentation", "UnsupervisedSegmentation"),
    "reporting.drawings": ("draw_maps", "draw_masks", "draw_words"),
    "segmentation.class_prior": ("ClassPrior",),
    "segmentation.mask_options": ("MaskOptions",),
}


def __dir__() -> list[str]:
    """Also what has not been asked for yet."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"seg4diff_jax.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
