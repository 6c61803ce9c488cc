"""Small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convert.errors import CheckpointError


def read_json(path: Path, why: str = "") -> dict[str, Any]:
    """A file's JSON object. Raises CheckpointError naming the file; `why` says what an absent one was needed for."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file" + (f"; {why}" if why else "")) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(found).__name__}")
    return found
