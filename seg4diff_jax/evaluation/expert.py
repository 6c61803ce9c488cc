"""Writes into a checkpoint which of its blocks segments best, and at which noise level."""

from __future__ import annotations

import json
import os
from pathlib import Path

from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.sources.open import MINIATURE


def name_expert(model: str, block: int, step: int) -> None:
    """Writes `expert_block` and `expert_step` into the transformer's configuration. Raises as `configuration` does."""
    path = configuration(model)
    named = read_json(path) | {"expert_block": block, "expert_step": step}
    written = path.with_suffix(".new")
    written.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    os.replace(written, path)


def configuration(model: str) -> Path:
    """Returns the file of the transformer's configuration.

    Raises:
      ValueError: the checkpoint is not a directory in diffusers' layout.
    """
    directory = MINIATURE if model == "miniature" else Path(model).expanduser()
    path = directory / "transformer" / "config.json"
    if not path.is_file():
        raise ValueError(f"--name-expert writes into DIR/transformer/config.json, and {model} has no such file")
    return path
