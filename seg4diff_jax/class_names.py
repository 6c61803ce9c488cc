"""Warnings about lists of class names that are valid but probably not meant."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


class OneClassWarning(UserWarning):
    """The list of classes has only one class, which then gets every pixel."""


def one_class(names: Sequence[str]) -> str | None:
    """Returns a warning if the list has a single class, otherwise None."""
    if len(names) != 1 or with_commas(names):  # which says more
        return None
    return (
        f"{names[0]!r} is the only class, so every pixel is given to it: a pixel goes to the class that scores highest "
        f"there, and of one class that is always this one. Name what else is in the picture too, as in "
        f"{names[0]!r}, 'wall', 'floor', for a mask"
    )


def with_commas(names: Sequence[str]) -> str | None:
    """Returns a warning if a name has a comma, since it may be several names; otherwise None."""
    if not (found := [name for name in names if "," in name]):
        return None
    parts = [part.strip() for name in names for part in name.split(",") if part.strip()]
    return (
        f"class name {found[0]!r} has a comma in it and is asked for as one class. Names are separate words: "
        f"{shlex.join(parts) or 'ball cone'}; quote names with spaces, as in 'traffic light'"
    )
