"""The tensors of low-rank adapters: their names in every format, and whether they make up whole adapters.

A layer's adapter is two tensors. PyTorch's A is [rank, in] and its B [out, rank]; ours are [in, rank] and [rank, out].
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from convert.errors import CheckpointError
from convert.names import LINEAR, Shape
from convert.tables import mmdit as table
from seg4diff_jax.models.lora import Adapter, LoRAConfig
from seg4diff_jax.models.mmdit import MMDiTConfig

Side = Literal["a", "b"]
Value = TypeVar("Value")
FLOATS = {np.dtype(name) for name in ("float16", "float32", "float64", ml_dtypes.bfloat16)}


def _modules() -> dict[str, str]:
    """diffusers' name of each linear layer of a block, as in `attn.to_q`, and ours, as in `image.attention.q`."""
    theirs, ours = re.compile(r"transformer_blocks\.\{i\}\.(.+)\.weight"), re.compile(r"blocks\.\{i\}\.(.+)\.kernel")
    names = {}
    for rule in table.diffusers(MMDiTConfig()):
        module, target = theirs.fullmatch(rule.source_names[0]), ours.fullmatch(rule.target_names[0])
        if module and target and rule.transform is LINEAR:
            names[module[1]] = target[1]
    return names


MODULES = _modules()
TARGETS = {target: module for module, target in MODULES.items()}


class Factor(NamedTuple):
    """One tensor of a file, in our layout: `key` is its name there, `layer` our per-layer name."""

    key: str
    layer: str
    side: Side
    array: np.ndarray


@dataclass(frozen=True)
class Naming:
    """How a format names the two tensors of an adapter.

    Attributes:
      template: with `{block}`, `{layer}` and `{side}`.
      torch: PyTorch's layout, layers called as diffusers calls them, sides A and B; otherwise all three are ours.
    """

    template: str
    torch: bool = True

    def layer(self, ours: str) -> str:
        """This format's name, within its block, of the layer that we call `ours` in full."""
        return TARGETS[target_of(ours)] if self.torch else target_of(ours)

    def write(self, adapters: Mapping[str, Adapter]) -> dict[str, np.ndarray]:
        tensors = {}
        for layer, adapter in adapters.items():
            for side, array in zip("AB" if self.torch else "ab", adapter, strict=True):
                key = self.template.format(block=block_of(layer), layer=self.layer(layer), side=side)
                tensors[key] = array.T if self.torch else array
        return tensors

    def read(self, tensors: Mapping[str, np.ndarray]) -> tuple[list[Factor], list[str]]:
        """The factors among `tensors`, and the names of the rest."""
        pattern = re.escape(self.template)
        parts = {"block": r"0|[1-9]\d*", "layer": ".+", "side": "[AB]" if self.torch else "[ab]"}
        for name, part in parts.items():
            pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>{part})")
        known = MODULES if self.torch else {target: target for target in TARGETS}
        factors, rest = [], []
        for key, tensor in tensors.items():
            found = re.fullmatch(pattern, key)
            if found and found["layer"] in known:
                layer = f"blocks.{found['block']}.{known[found['layer']]}"
                side: Side = "a" if found["side"] in "aA" else "b"
                factors.append(Factor(key, layer, side, tensor.T if self.torch else tensor))
            else:
                rest.append(key)
        return factors, rest


NATIVE = Naming("blocks.{block}.{layer}.lora_{side}", torch=False)
DIFFUSERS = Naming("transformer.transformer_blocks.{block}.{layer}.lora_{side}.weight")
PEFT = Naming("base_model.model.transformer_blocks.{block}.{layer}.lora_{side}.weight")
RELEASE = Naming("backbone.transformer.transformer_blocks.{block}.{layer}.lora_{side}.default.weight")


def refuse(where: object, problems: list[str]) -> None:
    """Raise one CheckpointError that names the file and lists every problem; nothing when there is none."""
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise CheckpointError(f"{where}: its adapters cannot be used ({count}):\n  " + "\n  ".join(problems))


def pair(factors: Iterable[Factor], rank: int | None, problems: list[str]) -> dict[str, Adapter]:
    """Whole adapters, in the order of blocks and of their layers; what stands in the way is added to `problems`.

    Args:
      rank: what the file says it is; None: what most of its tensors have.
    """
    by_layer: dict[str, dict[Side, Factor]] = {}
    for factor in factors:
        by_layer.setdefault(factor.layer, {})[factor.side] = factor
    sound = {layer: sides for layer, sides in by_layer.items() if _is_sound(sides, problems)}
    if not sound:
        problems.append("there is no whole adapter in it")
        return {}
    adapters = {layer: Adapter(sides["a"].array, sides["b"].array) for layer, sides in sound.items()}
    rank = _usual(a.shape[1] for a, _ in adapters.values()) if rank is None else rank
    sizes: dict[str, list[Shape]] = {}
    for layer, (a, b) in adapters.items():
        sizes.setdefault(target_of(layer), []).append((a.shape[0], b.shape[1]))
    for layer, (a, b) in adapters.items():
        key, size, expected = sound[layer]["a"].key, (a.shape[0], b.shape[1]), _usual(sizes[target_of(layer)])
        if a.shape[1] != rank:
            problems.append(f"{key}: expected rank {rank}, found {a.shape[1]}")
        if size != expected:
            problems.append(f"{key}: the layer has {size} inputs and outputs, in other blocks {expected}")
    problems += [f"missing: an adapter of {layer}" for layer in _gaps(by_layer)]
    order = list(TARGETS)
    return {
        layer: adapters[layer] for layer in sorted(adapters, key=lambda x: (block_of(x), order.index(target_of(x))))
    }


def _is_sound(sides: dict[Side, Factor], problems: list[str]) -> bool:
    before = len(problems)
    for factor in sides.values():
        if factor.array.ndim != 2 or factor.array.dtype not in FLOATS:
            found = f"{factor.array.dtype} {list(factor.array.shape)}"
            problems.append(f"{factor.key}: expected a matrix of floating-point numbers, found {found}")
    if len(sides) == 1:
        (factor,) = sides.values()
        problems.append(f"{factor.key}: its {'B' if factor.side == 'a' else 'A'} is missing")
    elif len(problems) == before and sides["a"].array.shape[1] != sides["b"].array.shape[0]:
        found = f"{sides['a'].array.shape[1]} and {sides['b'].array.shape[0]}"
        problems.append(f"{sides['a'].key}: A and B have different ranks, {found}")
    return len(problems) == before


def _gaps(layers: Iterable[str]) -> list[str]:
    """Layers that should have an adapter since their block has one and so has the same layer of other blocks.

    How many blocks the model has is not known here: its last block updates no text, and some may lack the second
    attention; whether their layers are really absent shows when the adapters meet the model.
    """
    present = set(layers)
    blocks = sorted({block_of(layer) for layer in present})
    targets = [target for target in TARGETS if any(target_of(layer) == target for layer in present)]
    absent_in_last = ("text.attention.out", "text.mlp.up", "text.mlp.down")
    return [
        layer
        for block, target in product(blocks, targets)
        if (layer := f"blocks.{block}.{target}") not in present
        and not target.startswith("image.dual_attention.")
        and not (target in absent_in_last and block == blocks[-1])
    ]


def config_of(adapters: Mapping[str, Adapter], rank: int, alpha: float) -> LoRAConfig:
    """The configuration that has these adapters."""
    targets = {target_of(layer) for layer in adapters}
    return LoRAConfig(
        rank,
        float(alpha),
        tuple(target for target in TARGETS if target in targets),
        tuple(sorted({block_of(layer) for layer in adapters})),
    )


def _usual(values: Iterable[Value]) -> Value:
    return Counter(values).most_common(1)[0][0]


def block_of(layer: str) -> int:
    return int(layer.split(".")[1])


def target_of(layer: str) -> str:
    return layer.split(".", 2)[2]
