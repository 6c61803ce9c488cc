"""Runs the blocks of a transformer of any family: all of them, or those up to the last one that is read.

A block has joint attention of image and text. `qkv(state, vector)` returns the input of that attention, and
`block(state, vector, options)` the state after the block and its attention record.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from seg4diff_jax.models.attention import DEFAULT_OPTIONS, ForwardOptions, JointAttention, attention_record
from seg4diff_jax.models.conditioning import TextConditioning
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


class Run(NamedTuple):
    """Consecutive blocks that one scan runs: rows `start` to `stop` of stack number `stack`."""

    stack: int
    start: int
    stop: int
    first_block: int
    captured: bool


def run_blocks(
    trunk: Trunk,
    state: Any,
    vector: Float[Array, "batch dim"],
    stop: int,
    capture: Collection[int] = (),
    options: ForwardOptions = DEFAULT_OPTIONS,
) -> tuple[Any, dict[int, JointAttention]]:
    """Runs blocks 0 to `stop` (exclusive). Returns the state after them, and the records of those in `capture`.

    A segment of the text must be requested by its token numbers, not by name (`ForwardOptions.about`).
    """
    records: dict[int, JointAttention] = {}
    unrecorded = replace(options, request=None)
    for run in _runs(trunk.layer_stacks, capture, stop):
        wanted = options if run.captured else unrecorded
        step = lambda state, block, wanted=wanted: block(state, vector, wanted)
        state, stacked = scan_layers(step, state, trunk.stacks[run.stack], run.start, run.stop, options.remat)
        if run.captured:
            rows = range(run.stop - run.start)
            records |= {run.first_block + i: jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in rows}
    return state, records


def _runs(stacks: tuple[LayerStack, ...], capture: Collection[int], stop: int) -> Iterator[Run]:
    """Splits blocks 0 to `stop` into runs for one scan each: blocks of one stack, all captured or none."""
    for number, stack in enumerate(stacks):
        blocks = range(stack.start, min(stack.stop, stop))
        for captured, group in itertools.groupby(blocks, key=lambda block: block in capture):
            first, *rest = group
            begin = first - stack.start
            yield Run(number, begin, begin + 1 + len(rest), first, captured)


def attention_at(
    trunk: Trunk,
    latents: Float[Array, "batch height width channels"],
    timesteps: Float[Array, " batch"],
    conditioning: TextConditioning,
    *,
    block: int,
    options: ForwardOptions = DEFAULT_OPTIONS,
) -> JointAttention:
    """Returns the attention record of one block, and runs nothing after it.

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
) -> dict[int, JointAttention]:
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
    number, stack = next((number, stack) for number, stack in enumerate(trunk.layer_stacks) if last < stack.stop)
    block = take_layer(trunk.stacks[number], last - stack.start)
    image, text = block.qkv(state, vector)
    return records | {last: attention_record(image, text, options)}
