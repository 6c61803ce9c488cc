"""What is to be said of lists of class names that do what few mean."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


class OneClassWarning(UserWarning):
    """One class alone takes every pixel."""


def one_class(names: Sequence[str]) -> str | None:
    """What is to be said of a list of a single class; None of others."""
    if len(names) != 1:
        return None
    return (
        f"{names[0]!r} is the only class, so every pixel is given to it: a pixel goes to the class that scores highest "
        f"there, and of one class that is always this one. Name what else is in the picture too, such as "
        f"{names[0]!r} and 'background', for a mask"
    )


def with_commas(names: Sequence[str]) -> str | None:
    """What is to be said of class names that may be several; None where no name has a comma."""
    if not (found := [name for name in names if "," in name]):
        return None
    parts = [part.strip() for part in found[0].split(",") if part.strip()]
    return (
        f"class name {found[0]!r} has a comma in it and is asked for as one class. Names are separate words: "
        f"{shlex.join(parts) or 'ball cone'}; quote names with spaces, as in 'traffic light'"
    )
