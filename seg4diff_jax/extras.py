"""Finds the extra of this package that installs a missing library."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires


def extra_of(library: str) -> str | None:
    """Returns the first extra that has a library, given the name by which it is imported.

    None: no extra has it, or this is a clone that is not installed.
    """
    try:
        requirements = requires("seg4diff-jax") or []
    except PackageNotFoundError:
        return None
    for requirement in requirements:  # an extra may require another, as train requires `seg4diff-jax[evaluate]`
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"""extra == ["'](\w+)["']""", requirement)
        if name and extra and "[" not in requirement and _normalised(name[0]) == _normalised(library):
            return extra[1]
    return None


def missing(error: ModuleNotFoundError, wanted: str | None = None) -> str | None:
    """What to install, in one sentence; None when the module that is missing is of no extra.

    Args:
      wanted: the extra of what was started. Default: the first that brings the library.
    """
    library = (error.name or "").split(".")[0]
    if first := extra_of(library):
        return f"{library} is not installed: in the clone of seg4diff_jax type pip install -e '.[{wanted or first}]'"
    return None


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
