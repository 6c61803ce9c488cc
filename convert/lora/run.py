"""Reads adapters from a training run's checkpoints: of runs that were stopped, and of steps before the last.

A checkpoint holds adapters stacked, as they are trained. The configuration of the transformer shows which blocks a
stack is for; it is read from the model that the run names. Where the run keeps an average of its parameters, the
average is taken, as in the run's export.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from seg4diff_jax.convert.errors import CheckpointError, reason
from seg4diff_jax.convert.lora.files import CHECKPOINTS
from seg4diff_jax.convert.lora.formats import LoRACheckpoint
from seg4diff_jax.convert.lora.layers import config_of
from seg4diff_jax.convert.lora.names import block_of
from seg4diff_jax.convert.run_checkpoint import CONFIG, STATE, check_arrays, read_record, score
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.models.lora import Adapter

FACTOR = re.compile(r"transformer\.stacks\.(\d+)\.(.+)\.lora_a")

# Orbax warns that a file is absent that it never writes.
logging.getLogger("absl").addFilter(lambda record: not record.getMessage().startswith("Metadata file does not exist"))


def read_run(run: str | Path, which: str) -> LoRACheckpoint:
    """Returns the adapters of a checkpoint.

    Args:
      run: a training run's directory.
      which: last, best (the one with the largest finite held-out mIoU), or a step.

    Raises:
      CheckpointError: the run has no such checkpoint, it cannot be read, is damaged or holds no adapters, or the model
        that was trained cannot be found.
    """
    place = Path(run).expanduser() / CHECKPOINTS
    steps = _steps(place)
    step = _step(place, steps, which)
    try:
        return _read(place / str(step), run)
    except CheckpointError as error:
        others = [str(other) for other in steps if other != step]
        another = f" The run's other checkpoints: {', '.join(others)}" if others else ""
        raise CheckpointError(f"{error}.{another}") from None


def _read(checkpoint: Path, run: str | Path) -> LoRACheckpoint:
    record = read_record(checkpoint, CONFIG)
    if record.get("task") != "magnet":
        raise CheckpointError(f"{run} is a run of {record.get('task')}, whose checkpoints hold no adapters")
    settings = _settings(record, checkpoint)
    try:
        state = arrays_of((checkpoint / STATE).absolute())
        kind = "average" if state["average"] else "trainable"
        chosen = state[kind]
    except Exception as error:  # Orbax and the file system raise many classes of errors
        raise CheckpointError(f"{checkpoint} cannot be read: {reason(error)}") from error
    check_arrays(checkpoint, chosen, below=f"{kind}/")
    adapters = _adapters(chosen, settings, checkpoint)
    head = ("the mask head",) if any(name.startswith("head.") for name in chosen) else ()
    left_out = (*head, f"the optimizer's state and what else there is of step {checkpoint.name}")
    return LoRACheckpoint(config_of(adapters, settings.rank, settings.alpha), adapters, left_out=left_out)


class Settings(NamedTuple):
    """A run's settings of its adapters, from its configuration. `blocks` is None for all blocks of the model."""

    model: str
    rank: int
    alpha: float
    blocks: list[int] | None


def _settings(record: dict[str, Any], checkpoint: Path) -> Settings:
    given: Any = record["lora"] if isinstance(record.get("lora"), dict) else {}
    model: Any = record.get("model")
    found = Settings(model, given.get("rank"), given.get("alpha"), given.get("blocks"))
    whole = lambda value: type(value) is int
    right = {
        "model": isinstance(found.model, str),
        "lora.rank": whole(found.rank) and found.rank > 0,
        "lora.alpha": type(found.alpha) in (int, float) and math.isfinite(found.alpha),
        "lora.blocks": found.blocks is None or (isinstance(found.blocks, list) and all(map(whole, found.blocks))),
    }
    if wrong := [name for name, is_right in right.items() if not is_right]:
        raise CheckpointError(
            f"{checkpoint / CONFIG}: {' and '.join(wrong)} absent or of no use: the record is damaged"
        )
    return found


def _steps(place: Path) -> list[int]:
    steps = sorted(int(path.name) for path in place.glob("[0-9]*") if path.name.isdigit())
    if not steps:
        raise CheckpointError(f"{place} has no checkpoints")
    return steps


def _step(place: Path, steps: list[int], which: str) -> int:
    if which == "last":
        return steps[-1]
    if which == "best":
        scores = {step: miou for step in steps if (miou := score(place / str(step), "miou")) is not None}
        if not scores:
            raise CheckpointError(
                f"{place}: none of the checkpoints {', '.join(map(str, steps))} was evaluated to a finite mIoU: give "
                "last or a step"
            )
        return max(scores, key=lambda step: (scores[step], step))
    if which.isdigit() and int(which) in steps:
        return int(which)
    raise CheckpointError(f"{place} has no checkpoint {which}: give last, best or one of {', '.join(map(str, steps))}")


def arrays_of(directory: Path) -> Any:
    """Returns a checkpoint's content as arrays in this machine's memory, wherever its arrays were before."""
    reader = ocp.PyTreeCheckpointer()
    stored: Any = reader.metadata(directory)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored.item_metadata.tree)
    return reader.restore(directory, restore_args=as_numpy)


def _adapters(arrays: dict[str, np.ndarray], settings: Settings, checkpoint: Path) -> dict[str, Adapter]:
    source = open_source(settings.model, components=["transformer"])
    config = source.parsed["transformer"]
    stacks = config.layer_stacks(config.num_layers)
    found: dict[str, Adapter] = {}
    for name, a in arrays.items():
        if match := FACTOR.fullmatch(name):
            b, number = arrays.get(name[: -len("a")] + "b"), int(match[1])
            blocks = range(stacks[number].start, stacks[number].stop) if number < len(stacks) else range(0)
            if b is None or len(blocks) != len(a) or len(a) != len(b):
                raise CheckpointError(f"{checkpoint}: {name} does not fit the blocks of {settings.model}")
            stack = stacks[number]
            for row, block in enumerate(blocks):
                if settings.blocks is None or block in settings.blocks:
                    found[f"{stack.layers}.{block}.{match[2]}"] = Adapter(a[row], b[row])
    return {layer: found[layer] for layer in sorted(found, key=block_of)}
