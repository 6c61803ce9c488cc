"""Compiles the evaluator's programs ahead of time for TPUs: a chip's memory, and at most how many images a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.models.flops import block_flops, clip_text_flops, embedding_flops, maps_flops, vae_encoder_flops
from seg4diff_jax.numerics import computing
from seg4diff_jax.parallel import make_mesh
from seg4diff_jax.planning.arithmetic import FP32_PASSES, operations
from seg4diff_jax.planning.chips import Chip, Slice
from seg4diff_jax.planning.compiled import Compiled, Memory, Moved, compiled
from seg4diff_jax.planning.evaluator_programs import (
    EvaluatorConfig,
    EvaluatorModels,
    described,
    each_program,
    settled_config,
)
from seg4diff_jax.planning.placement import on_one_chip, read_on_one_chip
from seg4diff_jax.prompt_cache import REMEMBERED


@dataclass(frozen=True)
class ProgramPlan:
    """What one run of one program needs of one chip.

    Attributes:
      runs: how often a batch runs it.
      done: operations, those of fp32 in bf16 operations.
      memory: of the chip while it runs, with all that stays there.
      moved: bytes moved; None if the compiler gave up.
    """

    name: str
    runs: int
    done: float
    memory: Memory
    moved: Moved | None

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Returns lower bounds of a run's seconds, by resource."""
        moved = self.moved or Moved(0.0, ())
        return {
            "compute": self.done / chip.flops,
            "HBM": moved.hbm / chip.memory_rate,
            "interconnect": moved.received / chip.link_rate,
        }

    def seconds(self, chip: Chip) -> float:
        """Returns the least seconds of all runs: programs run one after the other, each as its slowest part allows."""
        return self.runs * max(self.bounds(chip).values())


@dataclass(frozen=True)
class EvaluatorPlan:
    """What the evaluation of one batch needs of each chip of a slice. Each host has batches of its own.

    Attributes:
      needed: operations that masks of one image need.
      seconds: time of tracing and compiling.
    """

    slice: Slice
    config: EvaluatorConfig
    programs: tuple[ProgramPlan, ...]
    needed: float
    seconds: float = field(compare=False)

    @property
    def fullest(self) -> ProgramPlan:
        """The program that does not fit, or else the one with the most memory."""
        return max(self.programs, key=lambda each: (each.memory.gave_up, each.memory.total))

    @property
    def fits(self) -> bool:
        return all(each.memory.fits for each in self.programs)

    @property
    def images(self) -> int:
        """Number of images of a batch, over all hosts."""
        assert self.config.batch_size is not None
        return self.config.batch_size * (self.slice.chips // self.slice.host.chips)

    @property
    def bounds(self) -> dict[str, float]:
        """Returns lower bounds of a batch's seconds, by resource, the other two left out."""
        each = [
            {name: one.runs * value for name, value in one.bounds(self.slice.chip).items()} for one in self.programs
        ]
        return {name: sum(one[name] for one in each) for name in each[0]}

    @property
    def images_per_second(self) -> float:
        """The most that arithmetic, HBM and interconnect allow."""
        return self.images / sum(each.seconds(self.slice.chip) for each in self.programs)


def plan_evaluator(
    config: EvaluatorConfig, where: Slice, *, on_program: Callable[[str, float], None] = lambda name, seconds: None
) -> EvaluatorPlan:
    """Compiles the programs of an evaluation for one host of a slice, from shapes alone.

    Args:
      on_program: called with each program's name when it is compiled, and with the seconds that this took.

    Raises:
      CheckpointError: the checkpoint's configuration cannot be read.
      ValueError: an option does not fit the checkpoint or the slice.
      ModuleNotFoundError: libtpu is not installed.
    """
    begun = time.perf_counter()
    checkpoint, host = described(config), where.host
    config = settled_config(config, checkpoint, host.chips)
    mesh, programs = make_mesh(among=host.devices()), []
    with computing(config.dtype, mesh):
        models = EvaluatorModels.of(config, checkpoint, mesh)
        resident = {name: on_one_chip(part) for name, part in models.parts.items()}
        prompts = REMEMBERED if config.prompts == "present" else config.prompts_per_image
        resident["prompts"] = prompts * _bytes_of_prompt(config, checkpoint)

        def run(name: str, runs: int, function: Any, *arguments: Any, **static: Any) -> Any:
            start = time.perf_counter()
            traced = function.trace(*arguments, **static)
            found = compiled(traced, _arguments(traced.jaxpr, arguments), host.chip.memory)
            done = operations(traced.jaxpr, host.chips, host.chips, passes=FP32_PASSES)
            programs.append(ProgramPlan(name, runs, done, beside(found.memory, resident), found.moved))
            on_program(name, time.perf_counter() - start)
            return _results(traced, found, mesh)

        each_program(config, checkpoint, models, mesh, run)
    seconds = time.perf_counter() - begun
    return EvaluatorPlan(where, config, tuple(programs), needed_flops(config, checkpoint), seconds)


def needed_flops(config: EvaluatorConfig, checkpoint: Checkpoint) -> float:
    """Counts the operations of one image's masks, for options as `settled_config` returns them."""
    assert config.size is not None
    assert config.block is not None
    transformer, tokens = checkpoint.transformer, checkpoint.clip_tokens
    image, text = (config.size // checkpoint.view.multiple) ** 2, tokens + 1  # a zero token stands for all of T5's
    blocks = sum(block_flops(transformer, number, image, text) for number in range(config.block))
    prompt = embedding_flops(transformer, image, text) + blocks + maps_flops(transformer, image, text)
    if config.prompts == "present":
        prompt += sum(clip_text_flops(checkpoint.configs[name], tokens) for name in checkpoint.family.clips)
    return vae_encoder_flops(checkpoint.vae, config.size, config.size) + config.prompts_per_image * prompt


def beside(memory: Memory, resident: Mapping[str, float]) -> Memory:
    """Returns a program's memory with all that stays on the chip, of which the program's arguments are a part."""
    others = {name: size for name, size in memory.parts.items() if name != "weights"}
    parts = {**resident, **others}
    return Memory(parts, sum(parts.values()), memory.limit, memory.gave_up)


def _arguments(jaxpr: Any, arguments: tuple[Any, ...]) -> dict[str, float]:
    found = {"weights": 0.0, "batch": 0.0}
    for argument, size in zip(arguments, read_on_one_chip(jaxpr, arguments), strict=True):
        found["weights" if isinstance(argument, nnx.Module) else "batch"] += size
    return found


def _results(traced: Any, found: Compiled, mesh: Mesh) -> Any:
    """Returns shapes and places of a program's results; each chip has all of them if the compiler gave up."""
    whole = NamedSharding(mesh, PartitionSpec())
    places = jax.tree.map(lambda _: whole, traced.out_info) if found.places is None else found.places
    array = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.tree.map(array, traced.out_info, places)


def _bytes_of_prompt(config: EvaluatorConfig, checkpoint: Checkpoint) -> float:
    """Returns the bytes of one prompt's conditioning: CLIP's tokens, a zero token, and the pooled vector."""
    transformer, itemsize = checkpoint.transformer, jax.numpy.dtype(config.dtype).itemsize
    states = (checkpoint.clip_tokens + 1) * transformer.joint_attention_dim
    return float(itemsize * (states + transformer.pooled_projection_dim))
