"""Blocks of one kind, stacked on a leading axis and scanned, so that compile time does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

Block = TypeVar("Block", bound=nnx.Module)


class LayerStack(NamedTuple):
    """Where a run of a model's layers lives: layers `start` to `stop` of `layers`, stacked in order at `path`.

    A converter names one layer's parameter `blocks.13.image.mlp.up.kernel`; in the model the same numbers are row 0 of
    `stacks.joint.image.mlp.up.kernel` when this record reads ("stacks.joint", "blocks", 13, 23).
    """

    path: str
    layers: str
    start: int
    stop: int


@runtime_checkable
class Layered(Protocol):
    """A model that says where its stacked layers are; all of ours do."""

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]: ...


class LayerParameter(NamedTuple):
    """Where one layer's parameter lies: at `path` of the module, there in this row; None: the whole array is it."""

    path: str
    row: int | None


def layer_parameters(model: Layered) -> dict[str, LayerParameter]:
    """Every parameter of a model, which may be abstract, by its per-layer name."""
    places: dict[str, LayerParameter] = {}
    for keys, _ in nnx.to_flat_state(nnx.state(model)):
        path = ".".join(map(str, keys))
        for stack in model.layer_stacks:
            if path.startswith(stack.path + "."):
                rest = path.removeprefix(stack.path)
                layers = range(stack.start, stack.stop)
                places |= {f"{stack.layers}.{i}{rest}": LayerParameter(path, i - stack.start) for i in layers}
                break
        else:
            places[path] = LayerParameter(path, None)
    return places


def stack_layers(make: Callable[[nnx.Rngs], Block], count: int, rngs: nnx.Rngs) -> Block:
    """`count` independently initialised blocks as one block whose parameters have a leading axis of that length."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_all(rngs: nnx.Rngs) -> Block:
        return make(rngs)

    return make_all(rngs)


def stack_length(stack: nnx.Module) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def take_layer(stack: Block, index: int | jax.Array) -> Block:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)


def scan_layers(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    stack: nnx.Module,
    start: int = 0,
    stop: int | None = None,
    remat: bool | Callable = False,
) -> tuple[Any, Any]:
    """Run `carry, output = step(carry, layer)` over layers `start` to `stop` of a stack; outputs come back stacked.

    A whole stack is scanned as it lies, so that gradients come back stacked too. Part of one is indexed inside the
    loop: a slice taken before it would copy the parameters. So would one taken before what is recomputed, which the
    backward pass keeps the inputs of; and where nothing else is recomputed, the parameters are looked up again.

    Args:
      remat: recompute each layer in the backward pass; True, or a `jax.checkpoint` policy.
    """
    length = stack_length(stack)
    stop = length if stop is None else stop
    whole = (start, stop) == (0, length)
    run = step if whole else lambda state, index: step(state, take_layer(stack, index))
    if remat:
        run = jax.checkpoint(run, policy=None if remat is True else remat)
    elif not whole:
        run = jax.checkpoint(run, policy=_all_but_lookups, prevent_cse=False)
    return jax.lax.scan(run, carry, stack if whole else jnp.arange(start, stop))


def _all_but_lookups(primitive: Any, *_: Any, **__: Any) -> bool:
    """A `jax.checkpoint` policy: keep everything but what `take_layer` finds."""
    return primitive.name not in ("dynamic_slice", "squeeze")
