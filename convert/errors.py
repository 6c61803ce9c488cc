"""What conversion raises when its input is at fault."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_REASON = 300
"""Characters."""
LISTED = 20
"""Problems or names that one message lists; a file can have as many as it has tensors."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, understood or written; the message says what is wrong and what to do."""


def reason(error: BaseException) -> str:
    """What a library or the system says went wrong, on one line and cut: some echo all of a damaged file."""
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


def listed(lines: Sequence[str]) -> list[str]:
    """The first of them and, in one more line, how many others there are."""
    others = len(lines) - LISTED
    return [*lines[:LISTED], f"and {others} more"] if others > 0 else [*lines]


def raise_all(problems: list[str], heading: str) -> None:
    """Raise one CheckpointError that lists the problems, a bounded number; nothing when there is none."""
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise CheckpointError("\n".join([f"{heading} ({len(problems)} problems):", *listed(problems)]))
