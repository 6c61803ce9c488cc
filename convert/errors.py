"""What conversion raises when its input is at fault."""

from __future__ import annotations

LONGEST_REASON = 300
"""Characters."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, understood or written; the message says what is wrong and what to do."""


def reason(error: BaseException) -> str:
    """What a library or the system says went wrong, on one line and cut: some echo all of a damaged file."""
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


def raise_all(problems: list[str], heading: str) -> None:
    """Raise one CheckpointError that lists every problem; nothing when there is none."""
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise CheckpointError("\n".join([f"{heading} ({len(problems)} problems):", *problems]))
