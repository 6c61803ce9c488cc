"""A training step compiled ahead of time for a slice of TPUs: what it holds, computes and moves; whether it fits."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from seg4diff_jax.magnet.task import TRAINABLE, MagnetConfig, loss, step_flops
from seg4diff_jax.parallel import make_mesh
from seg4diff_jax.planning.arithmetic import operations
from seg4diff_jax.planning.chips import Slice
from seg4diff_jax.planning.hlo import Collective, Program
from seg4diff_jax.planning.magnet_shapes import abstract_batch, abstract_magnet, described
from seg4diff_jax.training.loop import check_batch
from seg4diff_jax.training.step import traced_step

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip's HBM.

    Attributes:
      parts: what holds them. Arguments by kind (base, encoders, adapters, optimizer, batch) and what their layout in
        memory adds (padding), temporaries, output beside what lies in the arguments' memory, code. Where the
        compiler has given up: what it said.
      total: of the parts.
      limit: of the chip; where the compiler has given up, what it would have had.
      gave_up: the compiler found no program that fits.
    """

    parts: dict[str, float]
    total: float
    limit: float
    gave_up: bool = False

    @property
    def fits(self) -> bool:
        return not self.gave_up and self.total <= self.limit


@dataclass(frozen=True)
class Moved:
    """Bytes that a compiled step moves: to and from one chip's HBM, and to it over the interconnect."""

    hbm: float
    collectives: tuple[Collective, ...]

    @property
    def received(self) -> float:
        return sum((each.bytes for each in self.collectives), 0.0)


@dataclass(frozen=True)
class Plan:
    """What one step needs of one chip.

    Attributes:
      layout: data, fsdp and tensor.
      needed: operations that the step's gradients take, on one chip.
      done: those that the program does: what is computed again is among them, and padding.
      moved: None where the compiler has given up.
      seconds: that tracing and compiling took.
    """

    slice: Slice
    layout: tuple[int, ...]
    batch_size: int
    memory: Memory
    needed: float
    done: float
    moved: Moved | None
    seconds: float = field(compare=False)

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds that a step takes at least, by what it takes them for."""
        chip = self.slice.chip
        bounds = {"compute": self.done / chip.flops}
        if self.moved is not None:
            bounds |= {
                "HBM": self.moved.hbm / chip.memory_rate,
                "interconnect": self.moved.received / chip.link_rate,
            }
        return bounds


def plan_magnet(config: MagnetConfig, where: Slice) -> Plan:
    """Compile the step of a MAGNET run, from shapes alone.

    Raises:
      CheckpointError: the checkpoint's configuration cannot be read.
      ValueError: an option does not fit the checkpoint, or batch and mesh the slice.
      ModuleNotFoundError: libtpu is not installed.
    """
    begun = time.perf_counter()
    checkpoint, mesh = described(config), described_mesh(config, where)
    with jax.set_mesh(mesh):
        model, batch = abstract_magnet(config, checkpoint, mesh), abstract_batch(config, checkpoint, mesh)
        objective = partial(loss, config=config, checkpoint=checkpoint)
        steps = config.run.steps
        traced, state, frozen = traced_step(objective, model, TRAINABLE, batch, config.optimizer, mesh, steps=steps)
        base = on_one_chip({name: leaf for name, leaf in frozen.items() if name.startswith("transformer.")})
        arguments = {
            "base": base,
            "encoders": on_one_chip(frozen) - base,
            "adapters": on_one_chip((state.trainable, state.average)),
            "optimizer": on_one_chip(state.optimizer),
            "batch": on_one_chip(batch),
        }
        memory, moved = compiled(traced, arguments, where.chip.memory)
    return Plan(
        slice=where,
        layout=tuple(mesh.shape.values()),
        batch_size=config.run.batch_size,
        memory=memory,
        needed=step_flops(config, checkpoint) * config.run.batch_size / where.chips,
        done=operations(traced.jaxpr, where.chips, mesh.shape["data"] * mesh.shape["fsdp"]),
        moved=moved,
        seconds=time.perf_counter() - begun,
    )


def described_mesh(config: MagnetConfig, where: Slice) -> Mesh:
    """The run's mesh, of devices that are not there. Raises ValueError when its axes or the batch do not fit them."""
    layout = config.run.mesh
    try:
        mesh = make_mesh(layout.data, layout.fsdp, layout.tensor, among=where.devices())
        check_batch(config.run, mesh)
    except ValueError as error:
        raise ValueError(f"{where.name}: {error}") from None
    return mesh


def on_one_chip(tree: Any) -> float:
    """Bytes that a chip holds of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def compiled(traced: Any, arguments: dict[str, float], limit: float) -> tuple[Memory, Moved | None]:
    """What the compiler makes of a traced step whose arguments have these sizes, on a chip with this much memory."""
    try:
        program = traced.lower().compile()
    except JaxRuntimeError as error:
        return refused(str(error), arguments, limit), None
    text = Program.parse(program.as_text())
    return measured(program.memory_analysis(), arguments, limit), Moved(text.traffic(), tuple(text.collectives()))


def measured(analysis: Any, arguments: dict[str, float], limit: float) -> Memory:
    """From the compiler's memory analysis."""
    parts = {
        **arguments,
        "padding": float(analysis.argument_size_in_bytes) - sum(arguments.values()),
        "temporaries": float(analysis.temp_size_in_bytes),
        "output": float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        "code": float(analysis.generated_code_size_in_bytes),
    }
    return Memory(parts, sum(parts.values()), limit)


def refused(message: str, arguments: dict[str, float], limit: float) -> Memory:
    """From the compiler's message that no program fits, in one of the forms it has for it.

    Raises JaxRuntimeError when the message is about anything else.
    """
    size = r"\(?([\d.]+)([KMGT]?)\w*\)?"
    beside = re.search(rf"required for HLO temporaries {size} exceeds available HBM {size}", message)
    whole = re.search(rf"Used {size} of {size} hbm", message)
    found = beside or whole
    if found is None:
        raise JaxRuntimeError(message)
    needed, allowed = float(found[1]) * UNITS[found[2]], float(found[3]) * UNITS[found[4]]
    taken = sum(arguments.values(), 0.0)
    rest = {"temporaries": needed} if beside else {"everything else": needed - taken}
    return Memory(arguments | rest, taken + sum(rest.values()), min(allowed, limit), gave_up=True)
