"""Random numbers that are a pure function of two integers, on every platform and in every version of NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float

T = TypeVar("T")
Real = int | float


class Draws:
    """A stream of random numbers for element `index` of stream `stream`, both below 2^64.

    Uses Philox's raw output alone: NumPy promises never to change that, but may change its distributions.
    """

    BLOCK = 256

    def __init__(self, stream: int, index: int):
        self._philox = np.random.Philox(key=np.array([stream, index], np.uint64))
        self._block: list[float] = []

    def unit(self) -> float:
        """Returns a uniform number in [0, 1)."""
        if not self._block:
            self._block = ((self._philox.random_raw(self.BLOCK) >> np.uint64(11)) * 2.0**-53).tolist()
        return self._block.pop()

    def uniform(self, low: Real, high: Real) -> float:
        """Returns a uniform number in [low, high)."""
        return low + (high - low) * self.unit()

    def below(self, count: int) -> int:
        """Returns a uniform integer from 0 to count - 1."""
        return int(count * self.unit())

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def weighted(self, weights: dict[T, float]) -> T:
        """Returns a random key of `weights`, with probability in proportion to its value."""
        left = self.unit() * sum(weights.values())
        *firsts, last = weights
        for key in firsts:
            left -= weights[key]
            if left < 0:
                return key
        return last

    def shuffled(self, items: Sequence[T]) -> list[T]:
        keys = [self.unit() for _ in items]
        return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]

    def table(self, rows: int, columns: int) -> Float[np.ndarray, "rows columns"]:
        """Returns uniform numbers in [0, 1), multiples of 1/256, fp32. Faster than many calls of `unit`."""
        count = rows * columns
        raw = self._philox.random_raw(-(-count // 8)).astype("<u8")  # so that bytes come in the same order everywhere
        return raw.view(np.uint8)[:count].reshape(rows, columns).astype(np.float32) / np.float32(256)
