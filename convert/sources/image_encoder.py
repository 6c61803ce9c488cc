"""Loads CLIP's vision tower from a folder of transformers. The tower judges pictures, and is no part of SD3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seg4diff_jax.convert.assemble import abstract, assemble, translated
from seg4diff_jax.convert.configurations import check_values
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.names import NameTableError, assign, parameter_shapes
from seg4diff_jax.convert.sources.safetensors_stream import read_header, read_tensor
from seg4diff_jax.convert.tables import clip_vision
from seg4diff_jax.models.clip_vision import CLIPVision, CLIPVisionConfig


def load_image_encoder(folder: Path, *, dtype: Any) -> CLIPVision:
    """Reads `config.json` and `model.safetensors` of a CLIPVisionModelWithProjection.

    Raises:
      CheckpointError: a file is absent or damaged, or does not match the configuration.
    """
    described = read_json(folder / "config.json", "it describes CLIP's vision tower, CLIPVisionModelWithProjection")
    try:
        check_values(CLIPVisionConfig, described)
        config = CLIPVisionConfig.from_json(described)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: a model that is not implemented: {error}") from None
    model = abstract(lambda rngs: CLIPVision(config, dtype=dtype, param_dtype=dtype, rngs=rngs))
    weights = folder / "model.safetensors"
    tensors = read_header(weights)
    shapes = {name: info.shape for name, info in tensors.items()}
    dtypes = {name: info.dtype for name, info in tensors.items()}
    try:
        found = assign(clip_vision.diffusers(config), shapes, parameter_shapes(model), what=str(weights), dtypes=dtypes)
    except NameTableError as error:
        raise CheckpointError(str(error)) from None
    return assemble(model, translated(found, lambda name: read_tensor(tensors[name])), dtype=dtype)
