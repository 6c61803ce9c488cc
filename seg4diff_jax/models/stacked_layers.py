"""Stacks blocks of one kind on a leading axis and scans over them, so that compile time does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

Block = TypeVar("Block", bound=nnx.Module)


class LayerStack(NamedTuple):
    """The place of consecutive layers in a model: layers `start` to `stop` of `layers`, stacked in order at `path`.

    For example, a converter calls one layer's parameter `blocks.13.image.mlp.up.kernel`. With the record
    ("stacks.joint", "blocks", 13, 23) it is row 0 of the model's `stacks.joint.image.mlp.up.kernel`.
    """

    path: str
    layers: str
    start: int
    stop: int


@runtime_checkable
class Layered(Protocol):
    """A model that lists its stacked layers. All models of this package do."""

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]: ...


class LayerParameter(NamedTuple):
    """The place of one layer's parameter: a row of the array at `path` in the module. Row None: the whole array."""

    path: str
    row: int | None


def layer_parameters(model: Layered) -> dict[str, LayerParameter]:
    """Returns the place of every parameter of a model, by per-layer name. The model may be abstract."""
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
    """Initialises `count` blocks independently, and returns one block whose parameters have a leading axis for them."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_all(rngs: nnx.Rngs) -> Block:
        return make(rngs)

    return make_all(rngs)


def stack_length(stack: nnx.Module) -> int:
    """Returns the number of layers in a stack."""
    return jax.tree.leaves(stack)[0].shape[0]


def take_layer(stack: Block, index: int | jax.Array) -> Block:
    """Returns one layer of a stack, as a copy. `index` may be traced."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)


def scan_layers(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    stack: nnx.Module,
    start: int = 0,
    stop: int | None = None,
    remat: bool | Callable = False,
) -> tuple[Any, Any]:
    """Runs `carry, output = step(carry, layer)` over layers `start` to `stop` of a stack; outputs come back stacked.

    A whole stack is the scan's input, so that gradients come back stacked too. Part of a stack is indexed inside the
    loop, since a slice taken before the loop would copy the parameters. The lookup is also inside `jax.checkpoint`,
    which keeps its inputs for the backward pass: outside, it would keep a copy of every layer. Without `remat`, the
    lookup alone is computed again in the backward pass.

    Args:
      remat: recompute each layer in the backward pass (gradient checkpointing): True, or a `jax.checkpoint` policy.
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
    """A `jax.checkpoint` policy: keep everything except the results of `take_layer`."""
    return primitive.name not in ("dynamic_slice", "squeeze")
