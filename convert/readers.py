"""An opened checkpoint of any format: configurations, and parameters under our names."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from seg4diff_jax.convert.components import (
    COMPONENTS,
    component_shapes,
    expert_block,
    expert_step,
    parse_config,
    part_of,
    trained_size,
)
from seg4diff_jax.convert.configurations import check_depth
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.families import SD3, Family, Naming
from seg4diff_jax.convert.layout import contiguous
from seg4diff_jax.convert.names import Assignment, NameTableError, Shape, assign
from seg4diff_jax.convert.sources.stored_tensor import StoredTensor
from seg4diff_jax.flow import FlowSchedule
from seg4diff_jax.quoting import quoted

FLOAT8 = {np.dtype("float8_e4m3fn"), np.dtype("float8_e5m2")}

Layout = dict[str, tuple[Shape, np.dtype]]
"""Shape and dtype of each parameter, by our per-layer name."""


@runtime_checkable
class ComponentReader(Protocol):
    """Reads the parameters of one component under our per-layer names, one at a time."""

    name: str
    config: dict[str, Any]

    def layout(self) -> Layout:
        """Returns shape and dtype of every parameter, in the order in which `parameters` yields them."""
        ...

    def check(self) -> None:
        """Raises a CheckpointError that lists what is missing, surplus or of a wrong shape; no numbers are read."""
        ...

    def parameters(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yields each wanted parameter (default: all) once, layer by layer. The other parameters are not read."""
        ...


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. Configurations have been read; weights are looked at when a component is opened."""

    origin: str
    configs: dict[str, dict[str, Any]]
    open: Callable[[str], ComponentReader]
    tokenizers: dict[str, Path] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=lambda: dict(SD3.scheduler))
    model_index: dict[str, Any] = field(default_factory=lambda: SD3.model_index)
    recorded_expert: int | None = None
    family: Family = SD3

    @cached_property
    def parsed(self) -> dict[str, Any]:
        """Typed configurations by component, such as a `CLIPTextConfig`. Raises CheckpointError if one is damaged."""
        return {name: parse_config(name, config) for name, config in self.configs.items()}

    @property
    def expert_block(self) -> int | None:
        """The block whose attention segments best, or None if it is not known."""
        if self.recorded_expert is not None or "transformer" not in self.configs:
            return self.recorded_expert
        return expert_block(self.configs["transformer"])

    @property
    def expert_step(self) -> int:
        """The noise level at which the expert block segments best, counted from the clean end of 28."""
        return expert_step(self.configs.get("transformer", {}))

    @property
    def schedule(self) -> FlowSchedule:
        """The noise schedule.

        Raises CheckpointError for a scheduler that is not SD3's kind, or if the two files name different classes of it.
        """
        named, indexed = self.scheduler.get("_class_name"), self.model_index.get("scheduler", [None])[-1]
        if named is not None and indexed is not None and named != indexed:
            raise CheckpointError(
                f"{self.origin}: model_index.json says that the scheduler is {quoted(indexed)}, scheduler_config.json "
                f"that it is {quoted(named)}: write the same class into both"
            )
        try:
            return FlowSchedule.from_json(self.scheduler)
        except ValueError as error:
            raise CheckpointError(f"{self.origin}: scheduler/scheduler_config.json: {error}") from None

    @property
    def trained_size(self) -> int:
        """The side, in pixels, of the square images that the transformer was trained for."""
        return trained_size(self.configs["transformer"], self.configs.get("vae"))

    def copy_tokenizers_and_scheduler(self, directory: Path) -> None:
        for name, folder in self.tokenizers.items():
            shutil.copytree(folder, directory / name)  # the Hub's cache holds links; the files behind them are copied
        (directory / "scheduler").mkdir()
        (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(self.scheduler, indent=2))

    def component(self, name: str) -> ComponentReader:
        """Opens a component. Raises CheckpointError when the checkpoint does not have it or its files are damaged."""
        if name not in self.configs:
            raise CheckpointError(f"{self.origin} has no {name}; it has {', '.join(self.configs)}")
        return self.open(name)


@dataclass
class TorchComponent:
    """A component whose tensors lie in safetensors or GGUF files, under PyTorch's names or llama.cpp's.

    `where` names the files in messages. `prefix` stands before each tensor's name in the files. `once` says that the
    files will not be read again soon.
    """

    name: str
    config: dict[str, Any]
    naming: Naming
    tensors: Mapping[str, StoredTensor]
    where: str
    prefix: str = ""
    once: bool = False
    _assignments: list[Assignment] | None = None

    def check(self) -> None:
        """Raises CheckpointError as `ComponentReader.check` does, and when two copies of one parameter differ.

        Numbers are read only of parameters that are there twice.
        """
        for assignment in self.assignments():
            for name in assignment.again:
                first, second = (self.tensors[each].read() for each in (assignment.source, name))
                same = first.dtype == second.dtype and first.tobytes() == second.tobytes()
                if not same and not np.array_equal(first, second):
                    raise CheckpointError(
                        f"{self.name} ({self.where}): {self.prefix}{assignment.source} and {self.prefix}{name} are one "
                        "parameter, and hold different numbers: leave out the one that was not trained"
                    )

    def assignments(self) -> list[Assignment]:
        """Returns the parameters that each tensor fills, layer by layer in the order of the model."""
        if self._assignments is None:
            config = parse_config(self.name, self.config)
            check_depth(self.name, config, self.tensors, self.where)
            rules = COMPONENTS[self.name].rules[self.naming](config)
            expected = component_shapes(self.name, self.config)
            shapes: dict[str, Shape] = {name: tensor.shape for name, tensor in self.tensors.items()}
            dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}
            where = f"{self.name} ({self.where})"
            try:
                found = assign(rules, shapes, expected, what=where, prefix=self.prefix, dtypes=dtypes)
            except NameTableError as error:
                raise CheckpointError(str(error)) from None
            part = part_of(self.name, self.config)
            order = {name: number for number, name in enumerate(dict.fromkeys(part.values()))}
            self._assignments = sorted(found, key=lambda assignment: order[part[assignment.targets[0]]])
        return self._assignments

    def layout(self) -> Layout:
        shapes = component_shapes(self.name, self.config)
        return {
            target: (shapes[target], _widened(self.tensors[assignment.source].dtype))
            for assignment in self.assignments()
            for target in assignment.targets
        }

    def parameters(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        for assignment in self.assignments():
            if wanted is not None and not any(target in wanted for target in assignment.targets):
                continue
            tensor = self.tensors[assignment.source].read(once=self.once)
            arrays = assignment.transform.to_jax(tensor.astype(_widened(tensor.dtype), copy=False))
            for target, array in zip(assignment.targets, arrays, strict=True):
                if wanted is None or target in wanted:
                    yield target, contiguous(array)


def _widened(dtype: np.dtype) -> np.dtype:
    """Returns bfloat16 for an 8-bit float dtype, otherwise `dtype`.

    Nothing here computes in 8-bit floats, and bfloat16 holds them exactly.
    """
    return np.dtype("bfloat16") if dtype in FLOAT8 else dtype


def nbytes(component: ComponentReader, dtype: np.dtype | None = None) -> int:
    """Returns the size in bytes of a component's parameters in `dtype` (default: each in its own)."""
    return sum(math.prod(shape) * (dtype or own).itemsize for shape, own in component.layout().values())


def usual_dtype(component: ComponentReader) -> np.dtype:
    """Returns the dtype of most of a component's numbers."""
    count: Counter[np.dtype] = Counter()
    for shape, dtype in component.layout().values():
        count[dtype] += math.prod(shape)
    return count.most_common(1)[0][0]
