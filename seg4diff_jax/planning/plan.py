"""Compiles a training step ahead of time for a slice of TPUs, to tell its memory, operations, traffic and fit."""

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
    """The bytes of one chip's HBM that a step uses.

    Attributes:
      parts: bytes by use. Arguments by kind (base, encoders, adapters, optimizer, batch), what their layout in memory
        adds (padding), temporaries, output that is not in donated arguments' memory, and code. If the compiler gave
        up: the sizes in its message.
      total: sum of the parts.
      limit: bytes of HBM of the chip; if the compiler gave up, the bytes that it had available.
      gave_up: whether the compiler found no program that fits.
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
    """Bytes that a compiled step moves: to and from one chip's HBM, and to this chip over the interconnect."""

    hbm: float
    collectives: tuple[Collective, ...]

    @property
    def received(self) -> float:
        return sum((each.bytes for each in self.collectives), 0.0)


@dataclass(frozen=True)
class Plan:
    """What one step needs of one chip.

    Attributes:
      layout: number of chips along data, fsdp and tensor.
      needed: operations that the step's gradients need, on one chip.
      done: operations that the program computes, with recomputation and padding.
      moved: bytes moved; None if the compiler gave up.
      seconds: time of tracing and compiling.
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
        """Returns lower bounds of a step's seconds, by resource: compute, HBM and interconnect."""
        chip = self.slice.chip
        bounds = {"compute": self.done / chip.flops}
        if self.moved is not None:
            bounds |= {
                "HBM": self.moved.hbm / chip.memory_rate,
                "interconnect": self.moved.received / chip.link_rate,
            }
        return bounds


def plan_magnet(config: MagnetConfig, where: Slice) -> Plan:
    """Compiles the step of a MAGNET run, from shapes alone.

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
    """Returns the run's mesh, of devices that need not exist. Raises ValueError if its axes or the batch do not fit."""
    layout = config.run.mesh
    try:
        mesh = make_mesh(layout.data, layout.fsdp, layout.tensor, among=where.devices())
        check_batch(config.run, mesh)
    except ValueError as error:
        raise ValueError(f"{where.name}: {error}") from None
    return mesh


def on_one_chip(tree: Any) -> float:
    """Returns the bytes that one chip holds of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def compiled(traced: Any, arguments: dict[str, float], limit: float) -> tuple[Memory, Moved | None]:
    """Compiles a traced step, and returns its memory and traffic; no traffic if the compiler gave up.

    Args:
      arguments: bytes of the step's arguments, by kind.
      limit: bytes of HBM of the chip.
    """
    try:
        program = traced.lower().compile()
    except JaxRuntimeError as error:
        return refused(str(error), arguments, limit), None
    text = Program.parse(program.as_text())
    return measured(program.memory_analysis(), arguments, limit), Moved(text.traffic(), tuple(text.collectives()))


def measured(analysis: Any, arguments: dict[str, float], limit: float) -> Memory:
    """Makes a `Memory` from the compiler's memory analysis."""
    parts = {
        **arguments,
        "padding": float(analysis.argument_size_in_bytes) - sum(arguments.values()),
        "temporaries": float(analysis.temp_size_in_bytes),
        "output": float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        "code": float(analysis.generated_code_size_in_bytes),
    }
    return Memory(parts, sum(parts.values()), limit)


def refused(message: str, arguments: dict[str, float], limit: float) -> Memory:
    """Makes a `Memory` from one of the compiler's messages that no program fits.

    Raises:
      JaxRuntimeError: the message is about anything else.
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
