"""Damaged checkpoints, what a conversion says of them, and a damaged pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.models.encoders import Encoders
from seg4diff_jax.pipeline import Pipeline


def refusal(source: Path, **options) -> str:
    """What a conversion says that must fail and leave nothing behind."""
    target = source.parent / "target"
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, target, **options)
    assert not target.exists()
    assert not list(source.parent.glob(".*"))
    return str(caught.value)


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def with_damaged_autoencoder(pipe: Pipeline) -> Pipeline:
    """The same pipeline with an autoencoder of numbers that are none."""
    graph, state = nnx.split(pipe.vae)
    damaged = nnx.merge(graph, jax.tree.map(lambda leaf: leaf * jnp.nan, state))
    return replace(pipe, encoders=Encoders(damaged, *pipe.encoders.parts[1:]))
