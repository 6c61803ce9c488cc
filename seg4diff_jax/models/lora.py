"""Low-rank adapters for the MM-DiT's linear layers: y = x W + b + scale (x A) B, with scale = alpha / rank.

MAGNET trains adapters of rank 16 and alpha 16 on q, k, v and out of the image stream's attention in every block
(Seg4Diff, section 4). The base's parameters keep their names and arrays. A and B are stored beside them as `lora_a` and
`lora_b`, in fp32 whatever the base's dtype, and stacked like the base's kernels. They have a variable type of their
own, `LoRA`, so that `nnx.split(mmdit, LoRA, ...)` separates them from the base, and gradients and optimizer can be
taken of them alone: `nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LoRA))`, `nnx.Optimizer(mmdit, ..., wrt=LoRA)`.

Functions that return a model return a new one, which shares the argument's arrays. The argument is not changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from seg4diff_jax.checked import Checked
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.stacked_layers import LayerStack

IMAGE_ATTENTION = tuple(f"image.attention.{name}" for name in ("q", "k", "v", "out"))
TEXT_ATTENTION = tuple(f"text.attention.{name}" for name in ("q", "k", "v", "out"))


class LoRA(nnx.Variable):
    """A factor of an adapter, A or B. Only these variables are trained when the base is frozen."""


class Adapter(NamedTuple):
    """The two factors of one layer's adapter, as jax or numpy arrays."""

    a: Float[Any, "features rank"]
    b: Float[Any, "rank out"]


@dataclass(frozen=True)
class LoRAConfig(Checked):
    """The rank and alpha of adapters, and the linear layers that they adapt.

    Attributes:
      rank: columns of A and rows of B.
      alpha: the adapter's output is multiplied by alpha / rank.
      targets: linear layers, by their path in a block. If a block lacks a target, its other targets are adapted. The
        last block, which does not update the text, has no `text.attention.out`, and only some blocks of SD3.5-medium
        have an `image.dual_attention`.
      blocks: numbers of the adapted blocks, ascending; None: all that the model holds.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = IMAGE_ATTENTION
    blocks: tuple[int, ...] | None = None

    def problems(self) -> list[str]:
        """Returns what is wrong with the options, one sentence for each problem."""
        found = []
        if self.rank < 1:
            found.append(f"rank is {self.rank}; an adapter has a rank of at least 1")
        if not math.isfinite(self.alpha):
            found.append(f"alpha is {self.alpha}; expected a finite number")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            found.append(f"targets are {list(self.targets)}; name at least one layer, each once")
        if self.blocks is not None and (not self.blocks or list(self.blocks) != sorted({*self.blocks})):
            found.append(f"blocks are {list(self.blocks)}; name at least one, each once, in ascending order")
        return found

    @property
    def scale(self) -> float:
        """Factor of the adapter's output: alpha / rank."""
        return self.alpha / self.rank


class LoRALinear(nnx.Module):
    """A stack of linear layers with adapters. It replaces an `nnx.Linear` and holds the same kernel and bias.

    Attributes:
      kernel, bias: the base's own variables.
      lora_a, lora_b: fp32 [layers, in, rank] and [layers, rank, out].
      rows: the layers of the stack that are adapted. In the others both factors are zero. They stay zero in training,
        since the gradient of each factor is a product with the other factor.
      scale: alpha / rank.
    """

    def __init__(self, linear: nnx.Linear, rows: tuple[int, ...], config: LoRAConfig):
        layers, features, out = linear.kernel.get_value().shape
        self.kernel, self.bias = linear.kernel, linear.bias
        self.lora_a = LoRA(jnp.zeros((layers, features, config.rank), jnp.float32))
        self.lora_b = LoRA(jnp.zeros((layers, config.rank, out), jnp.float32))
        self.rows, self.scale = rows, config.scale
        self.dtype, self.param_dtype = linear.dtype, linear.param_dtype

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        """Applies layer and adapter. As everywhere in the model, products are in the computation's dtype."""
        variables = (self.kernel, self.lora_a, self.lora_b)
        kernel, a, b = (variable.get_value().astype(self.dtype) for variable in variables)
        x = x.astype(self.dtype)
        y = x @ kernel
        if self.bias is not None:
            y += self.bias.get_value().astype(self.dtype)
        return y + self.scale * ((x @ a) @ b)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of one layer's A and B."""
        return self.lora_a.get_value().shape[1:], self.lora_b.get_value().shape[1:]

    def set(self, adapters: list[Adapter]) -> None:
        """Sets the factors of the adapted layers, in the order of `rows`."""
        for variable, factors in ((self.lora_a, [a for a, _ in adapters]), (self.lora_b, [b for _, b in adapters])):
            stacked = jnp.stack([jnp.asarray(factor, jnp.float32) for factor in factors])
            variable.set_value(jnp.zeros_like(variable.get_value()).at[jnp.array(self.rows)].set(stacked))

    def linear(self, *, merged: bool) -> nnx.Linear:
        """Returns the layers without adapters; if `merged`, with scale A B added to their kernels."""
        _, features, out = self.kernel.get_value().shape
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plain = nnx.eval_shape(
            lambda: nnx.Linear(features, out, use_bias=self.bias is not None, rngs=nnx.Rngs(0), **options)
        )
        plain.kernel, plain.bias = self.kernel, self.bias
        if merged:
            factors = self.lora_a.get_value(), self.lora_b.get_value()
            plain.kernel = nnx.Param(_merged(self.kernel.get_value(), *factors, self.scale))
        return plain


@jax.jit
def _merged(
    kernel: Float[Array, "layers features out"],
    a: Float[Array, "layers features rank"],
    b: Float[Array, "layers rank out"],
    scale: float | Float[Array, ""],
) -> Float[Array, "layers features out"]:
    """Computes kernel + scale A B, summed in fp32 and rounded once.

    It takes one layer at a time, so that there is never an fp32 copy of all layers.
    """

    def one(layer: tuple[Array, Array, Array]) -> Array:
        kernel, a, b = layer
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    return jax.lax.map(one, (kernel, a, b))


def add_lora(mmdit: MMDiT, config: LoRAConfig, rngs: nnx.Rngs) -> MMDiT:
    """Returns the model with new adapters, which do not change its output yet.

    A is Gaussian with standard deviation 1 / rank, and B is zero.

    Args:
      mmdit: a model without adapters; it may hold fewer blocks than its configuration names.
      rngs: random numbers for A, from the stream `params`.

    Raises:
      ValueError: the model has adapters, it lacks one of the blocks, or there is a target that no adapted block has.
    """

    def initial(layer: LoRALinear) -> list[Adapter]:
        (features, rank), b = layer.shapes
        a = jax.random.normal(rngs.params(), (len(layer.rows), features, rank), jnp.float32) / rank
        return [Adapter(row, jnp.zeros(b, jnp.float32)) for row in a]

    return _with_adapters(mmdit, config, initial)


def apply_lora(
    mmdit: MMDiT,
    config: LoRAConfig,
    adapters: Mapping[str, tuple[Any, Any]],
    *,
    drop_absent_blocks: bool = False,
    partial: bool = False,
) -> MMDiT:
    """Returns the model with given adapters.

    Args:
      mmdit: a model without adapters.
      adapters: adapters as `lora_state` returns them and as converters read them.
      drop_absent_blocks: leave out adapters of blocks that the model's configuration has and the model does not hold.
        Otherwise they are refused. Adapters of any other unknown block are always refused.
      partial: accept adapters for only some of the layers that `config` names, and leave the other layers unchanged.
        Otherwise missing adapters are refused.

    Raises:
      ValueError: as for `add_lora` and `set_lora_state`, or no adapter is left.
    """
    if drop_absent_blocks:
        blocks = range(mmdit.depth) if config.blocks is None else config.blocks
        absent = range(mmdit.depth, mmdit.config.num_layers)
        held = tuple(block for block in blocks if block not in absent)
        if not held:
            raise ValueError(f"no adapter is for one of the blocks 0..{mmdit.depth - 1} that the model holds")
        config = replace(config, blocks=held)
        adapters = {name: pair for name, pair in adapters.items() if _block(name) not in absent}
    zeros = lambda layer: [Adapter(*(jnp.zeros(shape) for shape in layer.shapes))] * len(layer.rows)
    adapted = _with_adapters(mmdit, config, zeros)
    return set_lora_state(adapted, {**lora_state(adapted), **adapters} if partial else adapters)


def merge_lora(mmdit: MMDiT) -> MMDiT:
    """Returns a model without adapters that computes the same: scale A B is added to the kernels, rounded once."""
    return _without_adapters(mmdit, merged=True)


def remove_lora(mmdit: MMDiT) -> MMDiT:
    """Returns the base without its adapters, equal bit by bit to the model before `add_lora` or `apply_lora`."""
    return _without_adapters(mmdit, merged=False)


def lora_state(mmdit: MMDiT) -> dict[str, Adapter]:
    """Returns every adapter by per-layer name, such as `blocks.7.image.attention.q`; fp32, in the order of the blocks.

    Raises ValueError if the model has no adapters.
    """
    found = {
        name: Adapter(layer.lora_a.get_value()[row], layer.lora_b.get_value()[row])
        for place in _adapted(mmdit)
        for name, layer, row in place.rows
    }
    return {name: found[name] for name in sorted(found, key=_block)}


def set_lora_state(mmdit: MMDiT, adapters: Mapping[str, tuple[Any, Any]]) -> MMDiT:
    """Returns the model with all of its adapters replaced.

    Args:
      adapters: (A [in, rank], B [rank, out]) by per-layer name; any floating-point dtype, kept in fp32.

    Raises:
      ValueError: the model has no adapters, or some are missing, surplus or of a wrong shape; the message names all.
    """
    model = nnx.clone(mmdit)
    places = _adapted(model)
    expected = {name: layer.shapes for place in places for name, layer, _ in place.rows}
    problems = [f"missing: {name}" for name in expected if name not in adapters]
    problems += [f"surplus: {name} is not an adapted layer of the model" for name in adapters if name not in expected]
    for name, shapes in expected.items():
        found = tuple(tuple(np.shape(factor)) for factor in adapters.get(name, ()))
        if found and found != shapes:
            problems.append(f"wrong shape: {name}: expected A and B of {shapes}, found {found}")
    if problems:
        raise ValueError("adapters do not match the model:\n  " + "\n  ".join(problems))
    for place in places:
        place.layer.set([Adapter(*adapters[name]) for name, _, _ in place.rows])
    return model


def attached(mmdit: MMDiT) -> LoRAConfig | None:
    """Returns the configuration of a model's adapters, or None if it has none.

    Targets are sorted. `blocks` is None if all blocks that the model holds are adapted.
    """
    places = list(_places(mmdit))
    if not places:
        return None
    rank = places[0].layer.shapes[0][1]
    blocks = tuple(sorted({_block(name) for place in places for name, _, _ in place.rows}))
    return LoRAConfig(
        rank,
        places[0].layer.scale * rank,
        tuple(sorted({place.path for place in places})),
        None if blocks == tuple(range(mmdit.depth)) else blocks,
    )


class AdaptedLayers(NamedTuple):
    """The place of adapted layers in a model: at `path` in `stack`, which is stack number `number`."""

    number: int
    stack: LayerStack
    path: str
    layer: LoRALinear

    @property
    def rows(self) -> list[tuple[str, LoRALinear, int]]:
        """The per-layer name, the module and the row in its stack of each adapted layer."""
        prefix, start = self.stack.layers, self.stack.start
        return [(f"{prefix}.{start + row}.{self.path}", self.layer, row) for row in self.layer.rows]


def _with_adapters(mmdit: MMDiT, config: LoRAConfig, initial: Callable[[LoRALinear], list[Adapter]]) -> MMDiT:
    if list(_places(mmdit)):
        raise ValueError("the model has adapters already: merge_lora or remove_lora them first")
    model = nnx.clone(mmdit)
    blocks = range(model.depth) if config.blocks is None else config.blocks
    if absent := [block for block in blocks if not 0 <= block < model.depth]:
        raise ValueError(f"cannot adapt blocks {absent}: the model holds blocks 0..{model.depth - 1}")
    unused = dict.fromkeys(config.targets)
    for number, stack in enumerate(model.layer_stacks):
        rows = tuple(block - stack.start for block in blocks if stack.start <= block < stack.stop)
        for target in config.targets if rows else ():
            owner, name = _find(model.stacks[number], target)
            linear = getattr(owner, name, None)
            if isinstance(linear, nnx.Linear):
                layer = LoRALinear(linear, rows, config)
                layer.set(initial(layer))
                setattr(owner, name, layer)
                unused.pop(target, None)
    if unused:
        raise ValueError(f"no adapted block has a linear layer {', '.join(unused)}")
    return model


def _without_adapters(mmdit: MMDiT, *, merged: bool) -> MMDiT:
    model = nnx.clone(mmdit)
    for place in _adapted(model):
        owner, name = _find(model.stacks[place.number], place.path)
        setattr(owner, name, place.layer.linear(merged=merged))
    return model


def _adapted(mmdit: MMDiT) -> list[AdaptedLayers]:
    if not (found := list(_places(mmdit))):
        raise ValueError("the model has no adapters: add_lora or apply_lora some first")
    return found


def _places(mmdit: MMDiT) -> Iterator[AdaptedLayers]:
    for number, stack in enumerate(mmdit.layer_stacks):
        for path, module in nnx.iter_modules(mmdit.stacks[number]):
            if isinstance(module, LoRALinear):
                yield AdaptedLayers(number, stack, ".".join(map(str, path)), module)


def _find(block: nnx.Module, path: str) -> tuple[Any, str]:
    """Returns the module that holds a layer of a block (None if the block lacks it), and the layer's name there."""
    *parents, name = path.split(".")
    owner: Any = block
    for parent in parents:
        owner = getattr(owner, parent, None)
    return owner, name


def _block(name: str) -> int:
    """Returns the block number of a per-layer name; -1 if there is none."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1
