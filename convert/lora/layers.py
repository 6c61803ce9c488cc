"""Makes whole adapters of a file's factors, and gives all of them one rank and one alpha.

A layer's adapter is two tensors. PyTorch's A is [rank, in] and its B [out, rank]; ours are [in, rank] and [rank, out].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import TypeVar

import ml_dtypes
import numpy as np

from seg4diff_jax.convert.errors import CheckpointError, listed
from seg4diff_jax.convert.lora.names import MODULES, Factor, Side, block_of, scale_first, swap_halves, target_of
from seg4diff_jax.models.lora import Adapter, LoRAConfig

Value = TypeVar("Value")
FLOATS = {np.dtype(name) for name in ("float16", "float32", "float64", ml_dtypes.bfloat16)}
FLOATS_OF_8_BITS = {np.dtype(name) for name in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}
"""8-bit dtypes. Their factors are held as float16, which has all their values."""
LARGEST_ALPHA = 1e9


def refuse(where: object, problems: list[str]) -> None:
    """Raises one CheckpointError that names the file and lists the problems, a bounded number; nothing without any."""
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        listing = "\n  ".join(listed(problems))
        raise CheckpointError(f"{where}: its adapters cannot be used ({count}):\n  {listing}")


def is_alpha(value: object) -> bool:
    """Whether a value can be an alpha: a finite positive number, up to LARGEST_ALPHA, that is not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGEST_ALPHA


def pair(factors: Iterable[Factor], rank: Callable[[str], int] | None, problems: list[str]) -> dict[str, Adapter]:
    """Returns whole adapters, in the order of blocks and of their layers. Adds what is wrong to `problems`.

    Args:
      rank: the rank that the file states, by per-layer name; None: the file does not state it.
    """
    by_layer: dict[str, dict[Side, Factor]] = {}
    twice: list[str] = []
    for factor in factors:
        sides = by_layer.setdefault(factor.layer, {})
        if factor.side in sides:
            twice.append(f"{factor.key}: the same layer's {factor.side.upper()} as {sides[factor.side].key}")
        sides[factor.side] = factor
    if len(twice) > 1:
        twice = [f"{twice[0]}, and {len(twice) - 1} more such: of two adapters in one file save one alone"]
    problems += twice
    adapters = {layer: found for layer, sides in by_layer.items() if (found := _adapter(sides, problems)) is not None}
    if not adapters:
        problems.append("there is no whole adapter in it")
        return {}
    sizes: dict[str, list[tuple[int, int]]] = {}
    for layer, adapter in adapters.items():
        sizes.setdefault(target_of(layer), []).append(_size(layer, adapter))
    usual = {target: most_common(found) for target, found in sizes.items()}
    for layer, adapter in adapters.items():
        key, found, size = by_layer[layer]["a"].key, adapter.a.shape[1], _size(layer, adapter)
        if rank is not None and found != rank(layer):
            problems.append(f"{key}: expected rank {rank(layer)}, found {found}")
        if size != usual[target_of(layer)]:
            problems.append(
                f"{key}: the layer has {size} inputs and outputs, in other blocks {usual[target_of(layer)]}"
            )
    return in_order(adapters)


def in_order(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    order = {target: number for number, target in enumerate(MODULES)}
    return {layer: adapters[layer] for layer in sorted(adapters, key=lambda x: (block_of(x), order[target_of(x)]))}


def _adapter(sides: dict[Side, Factor], problems: list[str]) -> Adapter | None:
    """Returns a layer's adapter. If there is a problem, adds it to `problems` and returns None."""
    before = len(problems)
    for factor in sides.values():
        array = factor.array
        if array.ndim != 2 or array.dtype not in FLOATS | FLOATS_OF_8_BITS or 0 in array.shape:
            found = f"{array.dtype} {list(factor.shape)}"
            problems.append(f"{factor.key}: expected a matrix of floating-point numbers, found {found}")
        elif not np.isfinite(array).all():
            problems.append(f"{factor.key}: {np.sum(~np.isfinite(array))} of its numbers are NaN or infinite")
    if len(sides) == 1:
        (factor,) = sides.values()
        problems.append(f"{factor.key}: its {'B' if factor.side == 'a' else 'A'} is missing")
    if len(problems) > before:
        return None
    a, b = (
        factor.array.astype(np.float16) if factor.array.dtype in FLOATS_OF_8_BITS else factor.array
        for factor in (sides["a"], sides["b"])
    )
    if a.shape[1] != b.shape[0]:
        problems.append(f"{sides['a'].key}: A and B have different ranks, {a.shape[1]} and {b.shape[0]}")
        return None
    swapped = sides["b"].scale_first and scale_first(sides["b"].layer, a, b)
    return Adapter(a, swap_halves(b) if swapped else b)


def _size(layer: str, adapter: Adapter) -> tuple[int, int]:
    """Returns a layer's numbers of inputs and outputs.

    For a modulation the outputs are those of one part, since the number of parts differs between blocks.
    """
    inputs, outputs = adapter.a.shape[0], adapter.b.shape[1]
    whole_parts = target_of(layer).endswith(".modulation") and outputs % inputs == 0
    return inputs, inputs if whole_parts else outputs


def gaps(layers: Iterable[str], targets: Iterable[str] | None = None, *, every_block: bool = False) -> list[str]:
    """Returns layers that could have an adapter, since their block has one, but have none.

    This function does not know how many blocks the model has. The model's last block updates no text, and some blocks
    may lack the second attention. Whether these layers are really absent shows when the adapters are put on the model.

    Args:
      targets: kinds of layers to look for; None: the kinds that have an adapter in some block.
      every_block: look in all blocks up to the last one that has an adapter.
    """
    present = set(layers)
    adapted = {target_of(layer) for layer in present} if targets is None else set(targets)
    blocks = sorted({block_of(layer) for layer in present})
    blocks = list(range(blocks[-1] + 1)) if every_block and blocks else blocks
    absent_in_last = ("text.attention.out", "text.mlp.up", "text.mlp.down")
    return [
        layer
        for block, target in product(blocks, [target for target in MODULES if target in adapted])
        if (layer := f"blocks.{block}.{target}") not in present
        and not target.startswith("image.dual_attention.")
        and not (target in absent_in_last and block == blocks[-1])
    ]


def unite(adapters: Mapping[str, Adapter], alphas: Mapping[str, float]) -> tuple[LoRAConfig, dict[str, Adapter]]:
    """Returns adapters of one rank and one alpha, as our layers have, with the same products of A, B and alpha / rank.

    Smaller ranks are filled up with zeros. Where alpha / rank differs from most layers', B is multiplied by the
    quotient of the two: in B's own dtype if that holds the products exactly, otherwise in fp32. Adapters of one rank
    and one alpha are not changed.

    Args:
      alphas: alpha by per-layer name.
    """
    ranks = {layer: a.shape[1] for layer, (a, _) in adapters.items()}
    scales = {layer: alphas[layer] / ranks[layer] for layer in adapters}
    rank, scale = max(ranks.values()), most_common(scales.values())
    united = {
        layer: _padded(Adapter(a, b if scales[layer] == scale else _scaled(b, scales[layer] / scale)), rank)
        for layer, (a, b) in adapters.items()
    }
    of_full_rank = [alphas[layer] for layer in adapters if ranks[layer] == rank and scales[layer] == scale]
    return config_of(united, rank, of_full_rank[0] if of_full_rank else scale * rank), united


def _scaled(b: np.ndarray, factor: float) -> np.ndarray:
    wide = b.astype(np.float64) * factor
    with np.errstate(over="ignore"):
        same = wide.astype(b.dtype)
    return same if np.array_equal(same.astype(np.float64), wide) else wide.astype(np.promote_types(b.dtype, np.float32))


def _padded(adapter: Adapter, rank: int) -> Adapter:
    a, b = adapter
    missing = rank - a.shape[1]
    if not missing:
        return adapter
    zeros = np.zeros((len(a), missing), a.dtype), np.zeros((missing, b.shape[1]), b.dtype)
    return Adapter(np.concatenate([a, zeros[0]], axis=1), np.concatenate([b, zeros[1]]))


def config_of(adapters: Mapping[str, Adapter], rank: int, alpha: float) -> LoRAConfig:
    """Returns the configuration that has these adapters."""
    targets = {target_of(layer) for layer in adapters}
    return LoRAConfig(
        rank,
        float(alpha),
        tuple(target for target in MODULES if target in targets),
        tuple(sorted({block_of(layer) for layer in adapters})),
    )


def most_common(values: Iterable[Value]) -> Value:
    return Counter(values).most_common(1)[0][0]
