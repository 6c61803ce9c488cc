"""What an interrupted run was asked for: `progress/run.json` in its directory. It goes on with the same options only.

A file that is written here is either complete or absent, even if the machine crashes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.quoting import cut, quoted

DIRECTORY, RUN, UNFINISHED = "progress", "run.json", "file.unfinished"
MOST_CHANGES = 8
"""Most options that a message names."""


def asked_before(directory: Path) -> dict[str, Any] | None:
    """Returns what the interrupted run was asked for; None if there is no such run.

    Args:
      directory: the run's `progress`.

    Raises ValueError if run.json is damaged.
    """
    path = directory / RUN
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except CheckpointError as error:
        raise ValueError(f"{error}: give --overwrite to begin anew") from None


def refuse_changes(directory: Path, former: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises ValueError, which says what changed, if the interrupted run was asked for something else."""
    changed = [
        f"{cut(name)} was {quoted(former.get(name))} and is {quoted(asked.get(name))}"
        for name in dict.fromkeys((*former, *asked))
        if former.get(name) != asked.get(name)
    ]
    if changed:
        more = "; ..." if len(changed) > MOST_CHANGES else ""
        raise ValueError(
            f"{directory} is of a run with other options: {'; '.join(changed[:MOST_CHANGES])}{more}. Give the former "
            "ones to go on, or another --out"
        )


def begin(directory: Path, asked: Mapping[str, Any]) -> None:
    """Makes `progress`, and writes what the run is asked for."""
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory, directory / RUN, json.dumps(asked, indent=1, ensure_ascii=False).encode())


def write_whole(directory: Path, path: Path, contents: bytes) -> None:
    """Writes a file of the run whose `progress` is `directory`. Other folders never hold a part of a file."""
    unfinished = directory / UNFINISHED
    with unfinished.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
