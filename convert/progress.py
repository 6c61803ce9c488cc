"""Callbacks that report the progress of a long job."""

from __future__ import annotations

from collections.abc import Callable

OnBytes = Callable[[int, int], None]
"""Receives the number of bytes that are done, and the number in all."""
OnStage = Callable[[str], None]
"""Receives a description of the current stage."""


def counter(on_progress: OnBytes, total: int) -> Callable[[int], None]:
    """Returns a function that takes the bytes of each piece and passes their sum, from 0 on, to `on_progress`."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    advance(0)
    return advance
