"""The error that conversion raises for faulty input, and functions that keep its messages short."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_REASON = 300
"""Most characters that `reason` returns."""
LISTED = 20
"""Most problems or names that one message lists. A file can have as many problems as tensors."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, understood or written; the message says what is wrong and what to do."""


def reason(error: BaseException) -> str:
    """Returns an error's message on one line and cut: some libraries repeat all of a damaged file."""
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


def listed(lines: Sequence[str]) -> list[str]:
    """Returns the first LISTED lines and, in one more line, the number of the others."""
    others = len(lines) - LISTED
    return [*lines[:LISTED], f"and {others} more"] if others > 0 else [*lines]


def raise_all(problems: list[str], heading: str) -> None:
    """Raises one CheckpointError that lists the problems, a bounded number of them. Does nothing without problems."""
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise CheckpointError("\n".join([f"{heading} ({len(problems)} problems):", *listed(problems)]))
