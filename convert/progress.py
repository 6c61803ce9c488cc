"""How far a long job is, told in bytes."""

from __future__ import annotations

from collections.abc import Callable

Told = Callable[[int, int], None]
"""Is told the bytes done so far and those in all."""


def counter(told: Told, total: int) -> Callable[[int], None]:
    """Takes the bytes of each piece as it is done; `told` hears their sum, from 0 on."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        told(done, total)

    advance(0)
    return advance
