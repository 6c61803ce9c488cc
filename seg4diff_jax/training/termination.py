"""SIGTERM: the step that is under way is finished and checkpointed; what no step depends on is left where it is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


class Terminated(BaseException):
    """SIGTERM has come while something ran that may be left unfinished. No Exception: nobody catches it by chance."""


class Termination:
    """Knows whether SIGTERM has come: to this process or, where several are one run, to any of them."""

    def __init__(self):
        self._come, self._dispensable = False, False

    def come(self, step: int) -> bool:
        """Whether to stop after a step. Of several processes each calls this after every step; all stop at the same."""
        return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self._come

    @contextmanager
    def dispensable(self) -> Iterator[None]:
        """SIGTERM raises Terminated in such a block, as soon as what runs in it comes back to Python. Several processes
        finish it, for they work together."""
        self._dispensable = True
        try:
            if self._come:
                raise Terminated
            yield
        except Exception as error:
            if self._come:  # what was interrupted has made an error of its own of it
                raise Terminated from error
            raise
        finally:
            self._dispensable = False

    def __call__(self, *_: object) -> None:
        """The signal's handler."""
        self._come = True
        if self._dispensable:
            self._dispensable = False
            raise Terminated


@contextmanager
def termination() -> Iterator[Termination]:
    """While it lasts, SIGTERM does not end the process; one within another is the same. It is caught in the main thread
    alone. Where several processes are one run, JAX catches it, and lets them agree on a step."""
    former, own = signal.getsignal(signal.SIGTERM), Termination()
    in_main = threading.current_thread() is threading.main_thread()
    if isinstance(former, Termination) or jax.process_count() > 1 or not in_main:
        yield former if isinstance(former, Termination) else own
        return
    signal.signal(signal.SIGTERM, own)
    try:
        yield own
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if former is None else former)
