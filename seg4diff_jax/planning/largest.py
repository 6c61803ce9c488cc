"""The largest batch that fits, found by compiling for some."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from seg4diff_jax.planning.plan import Plan

MOST = 4096
"""Units of the batch beyond which nobody looks."""


def largest_batch(plan: Callable[[int], Plan], unit: int) -> Iterator[Plan]:
    """Plans on the way to the largest batch that fits, that of the last one that does; none fits: there is none.

    Memory is close to linear in the batch, so two plans say about where the limit is, and the plans on both sides of it
    settle it.

    Args:
      plan: of a batch size.
      unit: that batch sizes are multiples of.
    """
    seen: dict[int, Plan] = {}
    fits, fails, guess = 0, MOST + 1, 1
    while fails - fits > 1:
        seen[guess] = found = plan(guess * unit)
        yield found
        fits, fails = (guess, fails) if found.memory.fits else (fits, guess)
        guess = min(max(_estimate(seen), fits + 1), fails - 1)


def _estimate(seen: dict[int, Plan]) -> int:
    """The most units that would fit if memory went on as between the largest two batches seen."""
    if len(seen) == 1:
        return 2
    less, more = sorted(seen)[-2:]
    a, b = seen[less].memory, seen[more].memory
    each = (b.total - a.total) / (more - less)
    return MOST if each <= 0 else less + int((a.limit - a.total) // each)
