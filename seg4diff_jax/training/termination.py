"""Handles SIGTERM and Ctrl-C: the current step is finished and checkpointed; work that no step needs is stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

UNDER_WAY = (
    "Ctrl-C: the step that is under way is finished and checkpointed; Ctrl-C once more ends at once, without that"
)
SHOW_CURSOR = "\x1b[?25h"
"""Escape sequence that shows the cursor. Progress bars hide it, and a process that ends at once leaves it hidden."""


class Terminated(BaseException):
    """SIGTERM came during work that may be left unfinished. No `except Exception` catches it by accident."""


class Interrupted(Terminated, KeyboardInterrupt):
    """Ctrl-C came during such work. Also raised when Ctrl-C has stopped a run and the run's step is checkpointed."""


class Termination:
    """Knows whether a run must stop: whether SIGTERM or SIGINT came to any process of the run."""

    def __init__(self):
        self._signal: int | None = None
        self._dispensable = False
        self._alone = jax.process_count() == 1
        self._formerly: Callable[[], Any] = lambda: None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C came to this process."""
        return self._signal == signal.SIGINT

    @property
    def by(self) -> str:
        return "Ctrl-C" if self.interrupted else "SIGTERM"

    def come(self, step: int) -> bool:
        """Whether to stop after a step. Every process of a run calls this after every step; all stop at the same."""
        return self._signal is not None if self._alone else multihost_utils.reached_preemption_sync_point(step)

    @contextmanager
    def dispensable(self) -> Iterator[None]:
        """Makes a signal raise Terminated inside the block, as soon as control returns to Python.

        With several processes the block is finished first, since they compute it together.
        """
        self._dispensable = self._alone
        try:
            if self._alone and self._signal is not None:
                raise self._stopped()
            yield
        except Exception as error:
            if self._alone and self._signal is not None:  # Terminated may have become another error
                raise self._stopped() from error
            raise
        finally:
            self._dispensable = False

    def _stopped(self) -> Terminated:
        kind = Interrupted if self.interrupted else Terminated
        return kind(f"stopped by {self.by} before a step was taken")

    def __call__(self, number: int, *_: object) -> None:
        """Handles a signal."""
        again = self.interrupted and number == signal.SIGINT
        self._signal = self._signal or number
        if number == signal.SIGINT:
            self._formerly()  # a second Ctrl-C gets the handler that was there before
            if again:  # the second Ctrl-C came before that handler was restored
                signal.raise_signal(number)
            if not self._alone:
                os.kill(os.getpid(), signal.SIGTERM)  # JAX catches SIGTERM and informs the other processes
        if self._dispensable:
            self._dispensable = False
            raise self._stopped()
        if number == signal.SIGINT:
            _write(UNDER_WAY)


def _write(text: str) -> None:
    """Writes to stderr at once, even if the signal came during another write."""
    shown = SHOW_CURSOR if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""
    os.write(2, f"{shown}\n{text}\n".encode())


_current: Termination | None = None


@contextmanager
def termination() -> Iterator[Termination]:
    """Catches SIGTERM and a first Ctrl-C, which then do not end the process.

    A nested call yields the object of the outer one. Signals are caught in the main thread alone. In a run of several
    processes JAX catches SIGTERM, and the processes agree on a step through JAX.
    """
    global _current
    if _current is not None:
        yield _current
        return
    own = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield own
        return
    caught = [signal.SIGINT, signal.SIGTERM] if own._alone else [signal.SIGINT]
    former = {number: signal.getsignal(number) or signal.SIG_DFL for number in caught}
    own._formerly = lambda: signal.signal(signal.SIGINT, former[signal.SIGINT])
    for number in caught:
        signal.signal(number, own)
    _current = own
    try:
        yield own
    finally:
        _current = None
        for number, handler in former.items():
            signal.signal(number, handler)
