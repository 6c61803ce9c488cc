"""What conversion raises when its input is at fault."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be read, understood or written; the message says what is wrong and what to do."""


def raise_all(problems: list[str], heading: str) -> None:
    """Raise one CheckpointError that lists every problem; nothing when there is none."""
    if len(problems) == 1:
        raise CheckpointError(problems[0])
    if problems:
        raise CheckpointError("\n".join([f"{heading} ({len(problems)} problems):", *problems]))
