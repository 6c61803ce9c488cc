"""What a training run has left behind, read back."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from seg4diff_jax.training.checkpoints import Checkpoints


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def bytes_of(model: nnx.Module) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(model))]


def checkpointed(out: Path) -> list[int]:
    with Checkpoints(out, keep=9) as checkpoints:
        return checkpoints.steps
