"""Lists the versions of the libraries that results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("seg4diff-jax", "jax", "jaxlib", "flax", "numpy", "transformers", "pillow")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of `LIBRARIES`, by name."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a clone that is not installed
            continue
    return found
