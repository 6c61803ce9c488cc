"""Checks what a checkpoint's index names: parts in `model_index.json`, and paths that must stay in the directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from seg4diff_jax.convert.components import COMPONENTS, tokenizers_of
from seg4diff_jax.convert.errors import CheckpointError, raise_all
from seg4diff_jax.convert.families import SD3
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.quoting import quoted

LONGEST_NAME = 255
"""Most bytes of a file's name that file systems take."""
MOST_FOLDERS = 8
"""Most parts of a path; files of a checkpoint have four."""
PARTS = (*COMPONENTS, *tokenizers_of(list(COMPONENTS)), "scheduler")


def check_index(index: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for another model's index, or a part that is not [library, class] or [null, null]."""
    unet = index.get("unet")
    if isinstance(unet, list) and any(unet):
        raise CheckpointError(f"{where} names a unet, as of SDXL: expected {SD3.title}")
    problems = []
    for name in PARTS:
        entry = index.get(name, [None, None])
        pair = isinstance(entry, list) and len(entry) == 2
        if not pair or {type(each) for each in entry} not in ({str}, {type(None)}):
            problems.append(
                f'{where}: {name} is {quoted(entry)}; expected a library and a class, as in ["diffusers", '
                '"AutoencoderKL"], or [null, null] for none'
            )
    raise_all(problems, f"{where} is damaged")


def named_components(index: Mapping[str, Any]) -> list[str]:
    """Returns the components that a checked index says are there."""
    return [name for name in COMPONENTS if index.get(name, [None])[0]]


def is_inside(name: str) -> bool:
    """Whether a path can be a file's, and stays in the directory that it is relative to."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    short = len(parts) <= MOST_FOLDERS and all(len(part.encode("utf-8", "replace")) <= LONGEST_NAME for part in parts)
    return bool(parts) and short and not name.startswith("/") and ".." not in parts and "\0" not in name


def read_scheduler(directory: Path, why: str = "") -> dict[str, Any]:
    """Returns a checkpoint's scheduler configuration. Numbers may be infinite, as diffusers' DPM-Solver has one.

    Raises CheckpointError as `read_json` does.
    """
    return read_json(directory / "scheduler" / "scheduler_config.json", why, finite=False)
