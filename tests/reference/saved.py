"""Read a saved safetensors file tensor by tensor, so that two frameworks need not hold one model at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from seg4diff_jax.convert.assemble import assemble, translated
from seg4diff_jax.convert.names import Rule, assign, parameter_shapes
from seg4diff_jax.models.stacked_layers import Layered


def load_saved(model: Layered, rules: Iterable[Rule], folder: Path) -> Layered:
    """Fill an abstract model from the one safetensors file in `folder`."""
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return assemble(model, translated(assign(rules, shapes, parameter_shapes(model)), file.get_tensor))
