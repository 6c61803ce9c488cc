"""Reads scaled fp8 as ComfyUI's files have it: beside each 8-bit weight lies the scale that multiplies it.

A layer has `weight` and `scale_weight`, or `weight` and `weight_scale`. A tensor `scaled_fp8` marks a file of the first
form; a tensor `comfy_quant` in each layer marks one of the second. `scale_input` and `input_scale` are for 8-bit
activations. They are no part of the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from seg4diff_jax.convert.errors import CheckpointError, raise_all
from seg4diff_jax.convert.files import parse_object
from seg4diff_jax.convert.layout import is_weight
from seg4diff_jax.convert.names import Shape
from seg4diff_jax.convert.sources.quantised import INSTEAD, refusal, refuse_foreign_forms
from seg4diff_jax.convert.sources.safetensors_stream import TensorInfo
from seg4diff_jax.convert.sources.stored_tensor import StoredTensor
from seg4diff_jax.quoting import quoted

MARKER = re.compile(r"(.+\.)?scaled_fp8")
"""Matches the name of a tensor of at most two numbers, of which only the dtype has a meaning."""
SCALE = re.compile(r"(?P<layer>.+\.)(scale_weight|weight_scale)")
OF_ACTIVATIONS = re.compile(r".+\.(scale_input|input_scale)")
DESCRIPTION = re.compile(r"(?P<layer>.+\.)comfy_quant")
"""Matches the name of a tensor that describes a layer's format: JSON as uint8."""
LONGEST_DESCRIPTION = 4096
FORMATS = ("float8_e4m3fn", "float8_e5m2")
HARMLESS = {"format", "full_precision_matrix_mult"}
"""Keys of a description that change no weight."""


@dataclass(frozen=True)
class ScaledTensor:
    """A weight, `value` x `scale`, in float32. `scale` is one number, or one per row in the shape [rows, 1, ...]."""

    value: TensorInfo
    scale: np.ndarray

    @property
    def shape(self) -> Shape:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, *, once: bool = False) -> np.ndarray:
        """Returns the numbers, as `StoredTensor.read` does."""
        product = self.value.read(once=once).astype(np.float32)
        np.multiply(product, self.scale, out=product)
        return product


def with_scales(tensors: Mapping[str, TensorInfo], where: str) -> dict[str, StoredTensor]:
    """Returns the weights of safetensors files: those with a scale multiplied by it, the others as they are.

    Args:
      tensors: all tensors of one file, or of the shards of one component.
      where: the file, in messages.

    Raises CheckpointError for quantised weights of another form, and one that lists every scale that cannot be used.
    """
    refuse_foreign_forms(tensors.keys(), where)
    problems = _problems_of_descriptions(tensors, where)
    weights: dict[str, StoredTensor] = {name: info for name, info in tensors.items() if not _is_beside(name, info)}
    for name, info in tensors.items():
        if not (found := SCALE.fullmatch(name)):
            continue
        weight = f"{found['layer']}weight"
        if weight not in tensors:
            problems.append(f"{where}: {name} is the scale of {weight}, which is missing")
            continue
        if isinstance(weights[weight], ScaledTensor):
            problems.append(f"{where}: {weight} has two scales, scale_weight and weight_scale; {INSTEAD}")
            continue
        _check_form(name, info, tensors[weight], where)
        scale = info.read().astype(np.float32)
        if (np.isfinite(scale) & (scale >= 0)).all():
            weights[weight] = ScaledTensor(
                tensors[weight], scale.reshape(_broadcast(info.shape, tensors[weight].shape))
            )
        else:
            problems.append(f"{where}: {name}: expected finite numbers of at least 0, found {scale.flat[:4].tolist()}")
    raise_all(problems, f"{where}: its 8-bit weights cannot be read")
    return weights


def _is_beside(name: str, info: TensorInfo) -> bool:
    """Whether a tensor describes weights and is no weight itself."""
    marks = MARKER.fullmatch(name) is not None and math.prod(info.shape) <= 2
    return marks or any(pattern.fullmatch(name) for pattern in (SCALE, OF_ACTIVATIONS, DESCRIPTION))


def _check_form(name: str, scale: TensorInfo, weight: TensorInfo, where: str) -> None:
    """Raises CheckpointError unless `scale` is one number or one per row of a floating-point weight.

    One such error stands for all layers.
    """
    if not is_weight(weight.dtype):
        raise refusal(where, f"{weight.dtype} weights with scales such as {name}")
    if not is_weight(scale.dtype) or _broadcast(scale.shape, weight.shape) is None:
        raise refusal(
            where,
            f"weights with a scale per block such as {name}, {scale.dtype} {list(scale.shape)} for {list(weight.shape)}"
            " (MXFP8),",
        )


def _broadcast(scale: Shape, weight: Shape) -> Shape | None:
    """Returns the shape in which a scale multiplies its weight: () or [rows, 1, ...]. None for a scale per block."""
    if math.prod(scale) == 1:
        return ()
    column = (*weight[:1], *[1] * (len(weight) - 1))
    return column if scale in (weight[:1], column) else None


def _problems_of_descriptions(tensors: Mapping[str, TensorInfo], where: str) -> list[str]:
    """Returns what is wrong with layers' descriptions. Raises CheckpointError for a format that is not read."""
    problems: list[str] = []
    for name, info in tensors.items():
        if not (found := DESCRIPTION.fullmatch(name)):
            continue
        described = _description(info)
        if described is None:
            problems.append(f"{where}: {name}: expected a JSON object of at most {LONGEST_DESCRIPTION} bytes as uint8")
        elif described.get("format") not in FORMATS:
            raise refusal(where, f"weights in the format {quoted(described.get('format'))}, which {name} names,")
        elif unknown := sorted(described.keys() - HARMLESS):
            raise refusal(where, f"fp8 weights with {', '.join(unknown)[:80]}, which {name} names,")
        elif f"{found['layer']}weight_scale" not in tensors:
            problems.append(f"{where}: {found['layer']}weight_scale is missing, {name} says it is here")
    return problems


def _description(info: TensorInfo) -> dict | None:
    if info.dtype != np.uint8 or info.nbytes > LONGEST_DESCRIPTION:
        return None
    try:
        return parse_object(info.read().tobytes(), str(info.file))
    except CheckpointError:
        return None
