"""Runs the blocks of a transformer of any family: all of them, or those up to the last one that is read.

A block has joint attention of image and text. `qkv(state, vector)` returns the input of that attention, and
`block(state, vector, options)` the state after the block and what a record is made of (`JointQKV`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seg4diff_jax.models.attention import DEFAULT_OPTIONS, QKV, UNRECORDED, ForwardOptions, attention_record
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.perturbation import Perturbing
from seg4diff_jax.models.stacked_layers import LayerStack, scan_layers, take_layer


@runtime_checkable
class Trunk(Protocol):
    """What a transformer must have so that its blocks can be run here: an embedding, and stacks of blocks.

    Attributes:
      depth: how many blocks the transformer holds, from the first.
      stacks: one module for each run of blocks of one kind, with stacked parameters; `layer_stacks` names the blocks.
    """

    depth: int
    stacks: Any

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]: ...

    def embed(
        self, latents: Array, timesteps: Array, conditioning: TextConditioning
    ) -> tuple[Any, Float[Array, "batch dim"]]:
        """Returns the input of the first block, and the vector that modulates every block."""
        ...

    def embed_concepts(self, timesteps: Array, conditioning: TextConditioning) -> Any:
        """Returns concept tokens as the first block reads them, a group for each prompt."""
        ...


def run_blocks(
    trunk: Trunk,
    state: Any,
    vector: Float[Array, "batch dim"],
    stop: int,
    capture: Collection[int] = (),
    options: ForwardOptions = DEFAULT_OPTIONS,
) -> tuple[Any, dict[int, Any]]:
    """Runs blocks 0 to `stop` (exclusive). Returns the state after them, and the records of those in `capture`.

    Blocks of one kind are one scan whichever are captured: of several, XLA on CPUs holds a further copy of a block's
    parameters for each of a single block (findings/xla_cpu_scan_of_one_step.sh). A segment of the text must be
    requested by its token numbers, not by name (`ForwardOptions.about`).
    """
    records: dict[int, Any] = {}
    for stack, blocks in zip(trunk.stacks, trunk.layer_stacks, strict=True):
        numbers = range(blocks.start, min(blocks.stop, stop))
        if numbers:
            state, kept = _run_alike(stack, state, vector, numbers, capture, options)
            captured = [block for block in numbers if block in capture]
            records |= {block: jax.tree.map(lambda leaf, i=i: leaf[i], kept) for i, block in enumerate(captured)}
    return state, records


def _run_alike(
    stack: Any,
    state: Any,
    vector: Float[Array, "batch dim"],
    numbers: range,
    capture: Collection[int],
    options: ForwardOptions,
) -> tuple[Any, Any]:
    """Runs blocks of one kind, the first of a stack; stacks the records of those that are captured.

    `numbers` are the numbers of the blocks in the model.
    """
    captured, perturbing = [block in capture for block in numbers], options.perturbing
    request = options.request if any(captured) else None
    options = replace(options, request=request, perturbing=None)
    run = lambda state, block: block(state, vector, options)
    scan = partial(scan_layers, stack=stack, stop=len(numbers), remat=options.remat)
    if request is None and perturbing is None:
        return scan(lambda state, block: (run(state, block)[0], None), state)
    if request is not None and perturbing is None and all(captured):
        read_each = lambda state, joint: (state, request.read(joint))
        return scan(lambda state, block: read_each(*run(state, block)), state)

    # Of some blocks, records are written into arrays that the scan carries along. Without the checkpoint, every block
    # would keep for the backward pass what a record's maps need, captured or not.
    read = jax.checkpoint(lambda joint: None if request is None else request.read(joint), prevent_cse=False)
    is_captured, places = jnp.array(captured), jnp.cumsum(jnp.array(captured)) - 1

    def step(carry, block):
        before, records, row = carry
        if isinstance(perturbing, Perturbing):
            own = perturbing.in_block(numbers.start + row)
            after, joint = block(before, vector, replace(options, perturbing=own))
            after = own.passed_by(before, after)
        else:
            after, joint = run(before, block)
        if request is not None:
            records = keep_if(is_captured[row], records, places[row], lambda: read(joint))
        return (after, records, row + 1), None

    one = jax.eval_shape(lambda: None if request is None else request.read(run(state, take_layer(stack, 0))[1]))
    (state, records, _), _ = scan(step, (state, room_for(sum(captured), one), 0))
    return state, records


def room_for(count: int, record: Any) -> Any:
    """Returns zeros for `count` records with the shapes of one, along a leading axis."""
    return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), record)


def keep_if(wanted: Bool[Array, ""], records: Any, place: Int[Array, ""], make: Callable[[], Any]) -> Any:
    """Writes the record that `make` returns at a place of `records` if it is wanted. If not, `make` is not run."""
    write = lambda records: jax.tree.map(lambda to, x: to.at[place].set(x), records, make())
    return jax.lax.cond(wanted, write, lambda records: records, records)


def block_of(trunk: Trunk, number: int) -> Any:
    """Returns one block, by its number in the model, with parameters of its own."""
    place, stack = next((place, stack) for place, stack in enumerate(trunk.layer_stacks) if number < stack.stop)
    return take_layer(trunk.stacks[place], number - stack.start)


def attention_at(
    trunk: Trunk,
    latents: Float[Array, "batch height width channels"],
    timesteps: Float[Array, " batch"],
    conditioning: TextConditioning,
    *,
    block: int,
    options: ForwardOptions = DEFAULT_OPTIONS,
) -> Any:
    """Returns the attention record of one block, and runs nothing after it.

    It is as the options' request reads it, by default a `JointAttention`.
    Of that block only q, k and the log-normaliser are computed, and what else the record holds. Arguments are as for
    `MMDiT.__call__`. The model may hold only the blocks up to `block`.

    Raises:
      ValueError: the model does not hold that block.
    """
    return attentions_at(trunk, latents, timesteps, conditioning, blocks=(block,), options=options)[block]


def attentions_at(
    trunk: Trunk,
    latents: Float[Array, "batch height width channels"],
    timesteps: Float[Array, " batch"],
    conditioning: TextConditioning,
    *,
    blocks: Collection[int],
    options: ForwardOptions = DEFAULT_OPTIONS,
) -> dict[int, Any]:
    """Returns the attention records of several blocks from one pass, which stops at the last as `attention_at` does.

    Raises:
      ValueError: there are no blocks, the model does not hold one of them, or the text has no such segment.
    """
    if not blocks:
        raise ValueError("no block is named: expected at least one whose attention is to be recorded")
    if absent := [block for block in blocks if not 0 <= block < trunk.depth]:
        which = f"block {absent[0]}" if len(absent) == 1 else f"blocks {absent}"
        raise ValueError(f"cannot capture {which}: the model holds blocks 0..{trunk.depth - 1}")
    last, options = max(blocks), options.about(conditioning)
    state, vector = trunk.embed(latents, timesteps, conditioning)
    state, records = run_blocks(trunk, state, vector, last, blocks, options)
    image, text = block_of(trunk, last).qkv(state, vector)
    return records | {last: attention_record(image, text, options)}


def concepts_at(
    trunk: Trunk,
    latents: Float[Array, "batch height width channels"],
    timesteps: Float[Array, " batch"],
    conditioning: TextConditioning,
    concepts: TextConditioning,
    *,
    block: int,
    options: ForwardOptions = UNRECORDED,
    capture: Collection[int] = (),
) -> tuple[QKV, QKV, QKV, dict[int, Any]]:
    """Returns queries, keys and values of image, text and concepts in one block, and the records of others before it.

    Nothing after it is run.

    Args:
      conditioning: the text that the image reads.
      concepts: prompts whose tokens read and do not write, the same number for each image, an image's after one
        another (`models.concepts`).
      options, capture: of the records, as for `run_blocks`.

    Raises ValueError when the model does not hold that block, or the prompts are not a multiple of the images.
    """
    if not 0 <= block < trunk.depth:
        raise ValueError(f"cannot read block {block}: the model holds blocks 0..{trunk.depth - 1}")
    groups, left = divmod(len(concepts.pooled), len(latents))
    if left or not groups:
        raise ValueError(
            f"{len(concepts.pooled)} prompts of concepts for {len(latents)} images: expected as many for each"
        )
    state, vector = trunk.embed(latents, timesteps, conditioning)
    state = replace(state, concepts=trunk.embed_concepts(jnp.repeat(timesteps, groups), concepts))
    state, records = run_blocks(trunk, state, vector, block, capture, options.about(conditioning))
    one = block_of(trunk, block)
    image, text = one.qkv(state, vector)
    return image, text, one.concepts_qkv(state.concepts), records
