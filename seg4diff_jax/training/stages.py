"""Reports the stages before a run's first step and after its last: a line at the start, and one with the seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from rich.console import Console

EVERY = 10
"""Seconds between two lines of `counted`."""


def say(text: str) -> None:
    """Prints on stderr, in the first process alone."""
    if jax.process_index() == 0:
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def stage(doing: str) -> Iterator[None]:
    """Says that a stage begins and, unless it fails, how long it took."""
    begun = time.perf_counter()
    say(f"{doing} ...")
    yield
    say(f"{doing}: {time.perf_counter() - begun:.1f} s")


def counted(batches: Iterable[dict[str, Any]], total: int, what: str) -> Iterator[dict[str, Any]]:
    """Yields the batches, and says every `EVERY` seconds how many of the `total` items have passed."""
    done, said = 0, time.perf_counter()
    for batch in batches:
        yield batch
        done += len(next(iter(batch.values())))
        if time.perf_counter() - said > EVERY:
            said = time.perf_counter()
            say(f"{done} of {total} {what}")
