"""Compiles a training step ahead of time for a slice of TPUs, to tell its memory, operations, traffic and fit."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

import jax
from jax.sharding import Mesh

from seg4diff_jax.magnet.task import TRAINABLE, MagnetConfig, loss, step_flops
from seg4diff_jax.parallel import make_mesh
from seg4diff_jax.planning.arithmetic import operations
from seg4diff_jax.planning.chips import Slice
from seg4diff_jax.planning.compiled import Memory, Moved, compiled
from seg4diff_jax.planning.magnet_shapes import abstract_batch, abstract_magnet, described
from seg4diff_jax.planning.placement import on_one_chip
from seg4diff_jax.training.loop import check_batch
from seg4diff_jax.training.step import traced_step


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
        found = compiled(traced, arguments, where.chip.memory)
    return Plan(
        slice=where,
        layout=tuple(mesh.shape.values()),
        batch_size=config.run.batch_size,
        memory=found.memory,
        needed=step_flops(config, checkpoint) * config.run.batch_size / where.chips,
        done=operations(traced.jaxpr, where.chips, mesh.shape["data"] * mesh.shape["fsdp"]),
        moved=found.moved,
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
