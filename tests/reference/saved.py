"""Read what transformers saved, tensor by tensor, so that two frameworks need not hold one model at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flax import nnx
from safetensors import safe_open

from convert.assemble import assemble, translated
from convert.names import Rule, assign, parameter_shapes


def load_saved(model: nnx.Module, rules: Iterable[Rule], folder: Path) -> nnx.Module:
    """Fill an abstract model from `folder/model.safetensors`."""
    with safe_open(folder / "model.safetensors", "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return assemble(model, translated(assign(rules, shapes, parameter_shapes(model)), file.get_tensor))
