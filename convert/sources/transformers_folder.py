"""Loads CLIP and DINO from folders of transformers. They judge pictures, and are no part of SD3."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from seg4diff_jax.convert.assemble import abstract, assemble, translated
from seg4diff_jax.convert.configurations import check_values
from seg4diff_jax.convert.errors import CheckpointError, raise_all
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.names import NameTableError, Rule, Shape, assign, parameter_shapes
from seg4diff_jax.convert.sources import hub
from seg4diff_jax.convert.sources.safetensors_stream import read_header
from seg4diff_jax.convert.sources.stored_tensor import StoredTensor
from seg4diff_jax.convert.sources.torch_pickle import load_pickle, to_numpy
from seg4diff_jax.convert.tables import clip, clip_vision, dino
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.clip_vision import CLIPVision, CLIPVisionConfig
from seg4diff_jax.models.dino import DINO, DINOConfig
from seg4diff_jax.models.stacked_layers import Layered
from seg4diff_jax.quoting import quoted

PROJECTION = 512
"""Default of a whole CLIP's `projection_dim` in transformers, whatever its two towers say."""
Config = TypeVar("Config", CLIPTextConfig, CLIPVisionConfig, DINOConfig)
Model = TypeVar("Model", bound=Layered)


def find_folder(model: str | Path, beside: Collection[str], example: str) -> Path:
    """Returns a model's folder: `model` itself, or a download of the Hub repository of that id.

    Args:
      beside: the files that are fetched besides `config.json` and the weights, if the repository has them.
      example: a Hub id, for the message.

    Raises CheckpointError when there is no such folder, or when it cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not hub.is_repository_id(str(model)):
        raise CheckpointError(f"{model}: no such directory, and not a Hub id like {example}")
    return hub.fetch_model(str(model), beside)


def load_image_encoder(folder: Path, *, dtype: Any) -> CLIPVision:
    """Reads a CLIPVisionModelWithProjection.

    Raises:
      CheckpointError: a file is absent or damaged, or does not match the configuration.
    """
    described = read_json(folder / "config.json", "it describes CLIP's vision tower, CLIPVisionModelWithProjection")
    return _vision(folder, described, _Weights.of(folder), dtype)


def load_whole_clip(folder: Path, *, dtype: Any) -> tuple[CLIPText, CLIPVision]:
    """Reads both towers of a CLIPModel. Raises CheckpointError as `load_image_encoder` does."""
    described = read_json(folder / "config.json", "it describes both towers of CLIP, CLIPModel")
    towers = described.get("text_config"), described.get("vision_config")
    if described.get("model_type") != "clip" or not isinstance(towers[0], dict) or not isinstance(towers[1], dict):
        raise CheckpointError(
            f"{folder / 'config.json'}: expected the model_type clip, with a text_config and a vision_config, found "
            f"{quoted(described.get('model_type'))} with the keys {quoted([*described])}"
        )
    # The whole model's own projection_dim counts, not those of its towers.
    projection = {"projection_dim": described.get("projection_dim", PROJECTION)}
    text, vision = towers[0] | projection, towers[1] | projection
    weights = _Weights.of(folder)
    text_config = _parsed(CLIPTextConfig, text, folder)
    make = lambda rngs: CLIPText(text_config, dtype=dtype, param_dtype=dtype, rngs=rngs)
    return _filled(abstract(make), clip.diffusers(text_config), weights, dtype), _vision(folder, vision, weights, dtype)


def load_dino_model(folder: Path, *, dtype: Any) -> DINO:
    """Reads a ViTModel or a Dinov2Model, alone or with a head. Raises CheckpointError as `load_image_encoder` does."""
    described = read_json(folder / "config.json", "it describes DINO (ViTModel) or DINOv2 (Dinov2Model)")
    config = _parsed(DINOConfig, described, folder)
    model = abstract(lambda rngs: DINO(config, dtype=dtype, param_dtype=dtype, rngs=rngs))
    weights = _Weights.of(folder).without(dino.PREFIXES[config.model_type])
    return _filled(model, dino.transformers(config), weights, dtype)


def _vision(folder: Path, described: dict[str, Any], weights: _Weights, dtype: Any) -> CLIPVision:
    config = _parsed(CLIPVisionConfig, described, folder)
    model = abstract(lambda rngs: CLIPVision(config, dtype=dtype, param_dtype=dtype, rngs=rngs))
    return _filled(model, clip_vision.diffusers(config), weights, dtype)


def _parsed(kind: type[Config], described: dict[str, Any], folder: Path) -> Config:
    try:
        check_values(kind, described)
        return kind.from_json(described)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: a model that is not implemented: {error}") from None


def _filled(model: Model, rules: list[Rule], weights: _Weights, dtype: Any) -> Model:
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in weights.tensors.items()}
    try:
        found = assign(rules, shapes, parameter_shapes(model), str(weights.file), weights.prefix, dtypes)
    except NameTableError as error:
        raise CheckpointError(str(error)) from None
    return assemble(model, translated(found, lambda name: weights.tensors[name].read()), dtype=dtype)


@dataclass(frozen=True)
class _Weights:
    """The tensors of a weight file by name, without the prefix of all names."""

    file: Path
    tensors: Mapping[str, StoredTensor]
    prefix: str = ""

    @classmethod
    def of(cls, folder: Path) -> _Weights:
        """Reads `model.safetensors`, or else `pytorch_model.bin`, which some published folders have alone."""
        safe, pickled = (folder / name for name in hub.WEIGHTS)
        if safe.exists() or not pickled.exists():
            return cls(safe, read_header(safe))
        return cls(pickled, _unpickled(pickled))

    def without(self, prefix: str) -> _Weights:
        """Removes `prefix`, if a name has it. A head's tensors do not."""
        if not any(name.startswith(prefix) for name in self.tensors):
            return self
        return _Weights(self.file, {name.removeprefix(prefix): each for name, each in self.tensors.items()}, prefix)


@dataclass(frozen=True)
class _Unpickled:
    """A tensor that was read with all of its file."""

    array: np.ndarray

    @property
    def shape(self) -> Shape:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, *, once: bool = False) -> np.ndarray:
        return self.array


def _unpickled(file: Path) -> dict[str, StoredTensor]:
    loaded = load_pickle(file)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{file}: expected tensors by name, found a {type(loaded).__name__}")
    arrays = {str(name): to_numpy(value) for name, value in loaded.items()}
    raise_all([f"{file}: {name}: expected a tensor" for name, array in arrays.items() if array is None], str(file))
    return {name: _Unpickled(array) for name, array in arrays.items() if array is not None}
