"""How far a long job is: the callbacks that hear of it."""

from __future__ import annotations

from collections.abc import Callable

OnBytes = Callable[[int, int], None]
"""Receives the number of bytes that are done, and how many there are."""
OnStage = Callable[[str], None]
"""Receives what is being done now."""


def counter(on_progress: OnBytes, total: int) -> Callable[[int], None]:
    """Adds up pieces: what it returns takes the bytes of each, and `on_progress` receives their sum, from 0 on."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    advance(0)
    return advance
