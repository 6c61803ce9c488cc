"""Writes a model in memory as a component of a diffusers checkpoint: `config.json` and safetensors, PyTorch's names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seg4diff_jax.convert.components import COMPONENTS, parse_config
from seg4diff_jax.convert.families import SD3
from seg4diff_jax.convert.layout import contiguous
from seg4diff_jax.convert.names import Rule, assign_back, parameters
from seg4diff_jax.convert.sources.safetensors_stream import write_safetensors
from seg4diff_jax.models.stacked_layers import Layered, layer_parameters


def layer_arrays(model: Layered) -> dict[str, np.ndarray]:
    """Returns every parameter by our per-layer name, on the host, as `convert.assemble.assemble` takes them."""
    arrays = {path: jax.device_get(variable.get_value()) for path, variable in parameters(model).items()}
    return {
        name: arrays[path] if row is None else arrays[path][row]
        for name, (path, row) in layer_parameters(model).items()
    }


def write_model(
    folder: Path, weights: str, config: Mapping[str, Any], model: Layered, rules: Iterable[Rule], dtype: Any
) -> None:
    """Writes `config.json` and `<weights>.safetensors` into a new folder.

    Raises NameTableError when a parameter has no name in PyTorch.
    """
    arrays, dtype = layer_arrays(model), np.dtype(dtype)
    tensors = {
        row.source: contiguous(row.transform.to_torch([arrays[target] for target in row.targets]), dtype)
        for row in assign_back(rules, arrays)
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(folder / f"{weights}.safetensors", shapes, iter(tensors.items()))


def write_component(directory: Path, name: str, config: Mapping[str, Any], model: Layered, dtype: Any) -> None:
    """Writes one of `convert.components.COMPONENTS` into a checkpoint's directory.

    Args:
      config: the configuration as diffusers or transformers write it.
    """
    component = COMPONENTS[name]
    rules = component.rules["diffusers"](parse_config(name, dict(config)))
    write_model(directory / name, component.weights, config, model, rules, dtype)


def write_index(directory: Path, scheduler: Mapping[str, Any] | None = None) -> None:
    """Finishes a checkpoint's directory: writes the scheduler, if given, and the index of its components."""
    if scheduler is not None:
        (directory / "scheduler").mkdir()
        (directory / "scheduler" / "scheduler_config.json").write_text(
            json.dumps({**SD3.scheduler, **scheduler}, indent=2)
        )
    there = lambda name: name.startswith("_") or (directory / name).is_dir()
    index = {name: entry if there(name) else [None, None] for name, entry in SD3.model_index.items()}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2))
