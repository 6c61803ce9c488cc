"""The largest batch that fits, found by compiling for some."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from seg4diff_jax.planning.plan import Memory, Plan

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
    """The most units that would fit if memory went on as between the smallest and the largest batch that do.

    Not as between neighbours: of two batches the compiler may hold the larger one in less. Nor as to one that does not
    fit, of which it says too little.
    """
    if len(fitting) < 2:
        return 2
    less, *_, more = sorted(fitting)
    each = (fitting[more].total - fitting[less].total) / (more - less)
    return 2 * more if each <= 0 else less + int((limit - fitting[less].total) // each)


def _next(fits: int, fails: int, estimate: int) -> int:
    """The estimate, or the middle if what has failed says that it is too high."""
    return max(estimate, fits + 1) if estimate < fails else (fits + fails) // 2
