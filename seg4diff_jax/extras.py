"""Which of the package's extras brings a library that is not installed."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires


def extra_of(library: str) -> str | None:
    """The first extra that has a library, by the name it is imported by; None when none has it, or in a clone that is
    not installed."""
    try:
        requirements = requires("seg4diff-jax") or []
    except PackageNotFoundError:
        return None
    for requirement in requirements:  # `seg4diff-jax[evaluate]` is one of train's
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"""extra == ["'](\w+)["']""", requirement)
        if name and extra and "[" not in requirement and _normalised(name[0]) == _normalised(library):
            return extra[1]
    return None


def missing(error: ModuleNotFoundError) -> str | None:
    """What to install, in one sentence; None when the module that is missing is of no extra."""
    library = (error.name or "").split(".")[0]
    if extra := extra_of(library):
        return f"{library} is not installed: in the clone of seg4diff_jax type pip install -e '.[{extra}]'"
    return None


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
