"""Damaging checkpoints, and what a conversion says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.checkpoint import convert_checkpoint
from convert.errors import CheckpointError


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
