"""SIGTERM and Ctrl-C: the step under way is finished and checkpointed; what no step depends on is left where it is."""

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
"""Progress bars hide it, and what is ended at once does not bring it back."""


class Terminated(BaseException):
    """SIGTERM has come while something ran that may be left unfinished. No Exception: nobody catches it by chance."""


class Interrupted(Terminated, KeyboardInterrupt):
    """The same of Ctrl-C; also raised by a run that Ctrl-C has stopped, once its step is checkpointed."""


class Termination:
    """Knows whether a run is to stop: SIGTERM or SIGINT has come to this process or, where several are one run, to any
    of them."""

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
        """Whether to stop after a step. Of several processes each calls this after every step; all stop at the same."""
        return self._signal is not None if self._alone else multihost_utils.reached_preemption_sync_point(step)

    @contextmanager
    def dispensable(self) -> Iterator[None]:
        """A signal raises Terminated in such a block, as soon as what runs in it comes back to Python. Several
        processes finish it, for they work together."""
        self._dispensable = self._alone
        try:
            if self._alone and self._signal is not None:
                raise self._stopped()
            yield
        except Exception as error:
            if self._alone and self._signal is not None:  # what was interrupted has made an error of its own of it
                raise self._stopped() from error
            raise
        finally:
            self._dispensable = False

    def _stopped(self) -> Terminated:
        kind = Interrupted if self.interrupted else Terminated
        return kind(f"stopped by {self.by} before a step was taken")

    def __call__(self, number: int, *_: object) -> None:
        """The signals' handler."""
        again = self.interrupted and number == signal.SIGINT
        self._signal = self._signal or number
        if number == signal.SIGINT:
            self._formerly()  # what Ctrl-C did before is what it does the next time
            if again:  # and it came before this was settled
                signal.raise_signal(number)
            if not self._alone:
                os.kill(os.getpid(), signal.SIGTERM)  # JAX catches it, and tells the others
        if self._dispensable:
            self._dispensable = False
            raise self._stopped()
        if number == signal.SIGINT:
            _write(UNDER_WAY)


def _write(text: str) -> None:
    """To stderr, whatever was being written there when the signal came."""
    shown = SHOW_CURSOR if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""
    os.write(2, f"{shown}\n{text}\n".encode())


_current: Termination | None = None


@contextmanager
def termination() -> Iterator[Termination]:
    """While it lasts, SIGTERM and a first Ctrl-C do not end the process; one within another is the same. They are
    caught in the main thread alone. Where several processes are one run, JAX catches SIGTERM, and lets them agree on a
    step."""
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
