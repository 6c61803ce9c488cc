"""A transformer's blocks in their order, whatever its family: all of them, or those up to one that is read.

A block joins the attention of image and text. It says what the attention reads, `qkv(state, vector)`, and what comes of
it, `block(state, vector, options)`: the state behind the block, and its attention record.
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
    """A transformer as its blocks are run: an entrance, and stacks of like blocks.

    Attributes:
      depth: how many blocks it holds, from the first.
      stacks: blocks of one kind, parameters stacked; `layer_stacks` says which.
    """

    depth: int
    stacks: Any

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]: ...

    def embed(
        self, latents: Array, timesteps: Array, conditioning: TextConditioning
    ) -> tuple[Any, Float[Array, "batch dim"]]:
        """The state at the first block's door, and the vector that modulates every block."""
        ...


class Run(NamedTuple):
    """Consecutive blocks that one scan takes: rows `start` to `stop` of stack number `stack`."""

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
    """Blocks 0 to `stop` of a transformer: the state behind them, and the records of those in `capture`.

    A requested segment of the text must be given as numbers (`ForwardOptions.about`).
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
    """Blocks 0 to `stop` in runs that one scan can take: all in one stack, all captured or none."""
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
    """The attention record of one block, and nothing after it: of that block only q, k and the normaliser are computed.

    Arguments as for `MMDiT.__call__`; the model may hold only the blocks up to `block`.

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
    """The attention records of several blocks from one pass that ends, as `attention_at` does, in the last of them.

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
