"""Finds the largest batch that fits, by compiling for several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from seg4diff_jax.planning.compiled import Memory
from seg4diff_jax.planning.plan import Plan

MOST = 4096
"""Largest number of units that the search tries."""


def largest_batch(plan: Callable[[int], Plan], unit: int) -> Iterator[Plan]:
    """Yields the plans of a search for the largest batch that fits. The last plan that fits has that batch.

    If no plan fits, no batch does. Memory is nearly linear in the batch size. So two plans give an estimate of the
    limit, and the plans on both sides of the limit confirm it.

    Args:
      plan: makes the plan of a batch size.
      unit: batch sizes are multiples of this.
    """
    fitting: dict[int, Memory] = {}
    fits, fails, limit, guess = 0, MOST + 1, float("inf"), 1
    while fails - fits > 1:
        found = plan(guess * unit)
        yield found
        limit = min(limit, found.memory.limit)
        if found.memory.fits:
            fits = guess
            fitting[guess] = found.memory
        else:
            fails = guess
        guess = _next(fits, fails, _estimate(fitting, limit))


def _estimate(fitting: dict[int, Memory], limit: float) -> int:
    """Estimates the largest number of units that fits, from the smallest and the largest batch known to fit.

    Neighbouring batches would not do: the compiler may need less memory for the larger one. Nor would a batch that does
    not fit: the compiler reports too little memory for it.
    """
    if len(fitting) < 2:
        return 2
    less, *_, more = sorted(fitting)
    each = (fitting[more].total - fitting[less].total) / (more - less)
    return 2 * more if each <= 0 else less + int((limit - fitting[less].total) // each)


def _next(fits: int, fails: int, estimate: int) -> int:
    """Returns the batch to try next: the estimate, or the middle if the estimate is known not to fit."""
    return max(estimate, fits + 1) if estimate < fails else (fits + fails) // 2
