"""Adapters of a training run's checkpoints: of runs that were stopped, and of steps before the last.

A checkpoint holds adapters stacked, as they are trained; which blocks a stack is of follows from the configuration of
the transformer, which is read from the model that the run names. Where the run keeps an average of its parameters, the
average is taken, as its export does.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from convert.components import parse_config
from convert.errors import CheckpointError
from convert.files import read_json
from convert.lora_formats import CHECKPOINTS, LoRACheckpoint
from convert.lora_layers import config_of
from convert.lora_names import block_of
from convert.sources import open_source
from seg4diff_jax.models.lora import Adapter

FACTOR = re.compile(r"transformer\.stacks\.(\d+)\.(.+)\.lora_a")

# Orbax misses a file that it does not write.
logging.getLogger("absl").addFilter(lambda record: not record.getMessage().startswith("Metadata file does not exist"))


def read_run(run: str | Path, which: str) -> LoRACheckpoint:
    """The adapters of a checkpoint.

    Args:
      run: a training run's directory.
      which: last, best (the one of the largest held-out mIoU), or a step.

    Raises:
      CheckpointError: the run has no such checkpoint, it cannot be read or holds no adapters, or the model that was
        trained cannot be found.
    """
    place = Path(run).expanduser() / CHECKPOINTS
    step = _step(place, which)
    record = read_json(place / str(step) / "config" / "metadata")
    if record.get("task") != "magnet":
        raise CheckpointError(f"{run} is a run of {record.get('task')}, whose checkpoints hold no adapters")
    try:
        state = arrays_of((place / str(step) / "state").absolute())
        chosen = state["average"] or state["trainable"]
    except Exception as error:  # what Orbax and the file system say
        raise CheckpointError(f"{place / str(step)} cannot be read: {' '.join(str(error).split())[:300]}") from error
    adapters = _adapters(chosen, record)
    head = ("the mask head",) if any(name.startswith("head.") for name in chosen) else ()
    left_out = (*head, f"the optimizer's state and what else there is of step {step}")
    config = config_of(adapters, record["lora"]["rank"], record["lora"]["alpha"])
    return LoRACheckpoint(config, adapters, left_out=left_out)


def _step(place: Path, which: str) -> int:
    steps = sorted(int(path.name) for path in place.glob("[0-9]*") if path.name.isdigit())
    if not steps:
        raise CheckpointError(f"{place} has no checkpoints")
    if which == "last":
        return steps[-1]
    if which == "best":
        scores = {step: score for step in steps if (score := _score(place / str(step))) is not None}
        if not scores:
            raise CheckpointError(
                f"{place}: none of the checkpoints {', '.join(map(str, steps))} was evaluated: give last or a step"
            )
        return max(scores, key=lambda step: (scores[step], step))
    if which.isdigit() and int(which) in steps:
        return int(which)
    raise CheckpointError(f"{place} has no checkpoint {which}: give last, best or one of {', '.join(map(str, steps))}")


def _score(checkpoint: Path) -> float | None:
    file = checkpoint / "metrics" / "metrics"
    return read_json(file).get("miou") if file.is_file() else None


def arrays_of(directory: Path) -> Any:
    """What a checkpoint holds, wherever its arrays lay, in this machine's memory."""
    reader = ocp.PyTreeCheckpointer()
    stored: Any = reader.metadata(directory)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored.item_metadata.tree)
    return reader.restore(directory, restore_args=as_numpy)


def _adapters(arrays: dict[str, np.ndarray], record: dict[str, Any]) -> dict[str, Adapter]:
    source = open_source(record["model"], components=["transformer"])
    config = parse_config("transformer", source.configs["transformer"])
    stacks = config.layer_stacks(config.num_layers)
    adapted = record["lora"]["blocks"]
    found: dict[str, Adapter] = {}
    for name, a in arrays.items():
        if match := FACTOR.fullmatch(name):
            stack, b = stacks[int(match[1])], arrays[name[: -len("a")] + "b"]
            for row, block in enumerate(range(stack.start, stack.stop)):
                if adapted is None or block in adapted:
                    found[f"{stack.layers}.{block}.{match[2]}"] = Adapter(a[row], b[row])
    return {layer: found[layer] for layer in sorted(found, key=block_of)}
