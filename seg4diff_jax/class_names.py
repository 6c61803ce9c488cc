"""Warnings about lists of class names that are valid but probably not meant."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterable, Sequence
from typing import Any


class OneClassWarning(UserWarning):
    """The list of classes has only one class, which then gets every pixel."""


def list_for_each(
    names: Sequence[str] | Sequence[Sequence[str]], count: int, of: str, shared: bool = False
) -> list[Any]:
    """Returns the list of names of each of `count` images or prompts, as `of` calls them.

    One list of names serves all, and so do any names if `shared`. Raises ValueError unless there is one for each else.
    """
    shared = shared or (len(names) > 0 and all(isinstance(name, str) for name in names))
    lists: list[Any] = [names] * count if shared else list(names)
    if len(lists) != count:
        raise ValueError(f"{count} {of} and {len(lists)} lists of class names; expected one for each")
    return lists


def warn_of_single(remarks: Iterable[str | None], stacklevel: int) -> None:
    """Warns (`OneClassWarning`) of each remark once. `stacklevel`: as of `warnings.warn`, called in this function."""
    for remark in dict.fromkeys(filter(None, remarks)):
        warnings.warn(remark, OneClassWarning, stacklevel=stacklevel)


def one_class(names: Sequence[str]) -> str | None:
    """Returns a warning if the list has a single class, otherwise None."""
    if len(names) != 1 or with_commas(names):  # which says more
        return None
    return (
        f"{names[0]!r} is the only class, so every pixel is given to it: a pixel goes to the class that scores highest "
        f"there, and of one class that is always this one. Name what else is in the picture too, as in "
        f"{names[0]!r}, 'wall', 'floor', for a mask"
    )


def one_word(names: Sequence[str]) -> str | None:
    """Returns a warning if a single name of a prompt's words gets masks, otherwise None."""
    if len(names) != 1:
        return None
    return (
        f"{names[0]!r} is the only word, so every pixel of the picture is given to it: a pixel goes to the word that "
        "scores highest there; name other words of the prompt too"
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
