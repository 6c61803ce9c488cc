"""Shows the progress of jobs: bars at a terminal, and a few plain lines where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_EVERY = 30
"""Seconds between lines of progress where there is no terminal."""


def stderr_console() -> Console:
    """Returns a console on stderr that prints text as it is, without markup, and does not wrap long lines."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class Bar:
    """A progress bar of a job's pieces, as a context. It shows nothing if there is no terminal.

    Args:
      doing: what the job does; shown before the bar.
      total, done: number of all pieces, and of those done so far.
      remark: first text beside the bar. A bar with remarks stays on the screen when the job ends. None: no remarks, and
        the bar disappears.
      elapsed: show the time since the job began.

    Attributes:
      shown: whether there is a bar.
    """

    def __init__(
        self,
        console: Console,
        doing: str,
        total: int,
        *,
        done: int = 0,
        remark: str | None = None,
        elapsed: bool = False,
    ):
        self.shown = console.is_terminal and not console.quiet
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", style="none" if remark is None else "bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
        ]
        columns += [] if remark is None else [TextColumn("{task.fields[remark]}", markup=False)]
        columns += [TimeElapsedColumn()] if elapsed else []
        columns += [TimeRemainingColumn()]
        self._progress = Progress(*columns, console=console, transient=remark is None, disable=not self.shown)
        self._task = self._progress.add_task(doing, total=total, completed=done, remark=remark)

    def __enter__(self) -> Bar:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def update(self, done: int, remark: str | None = None) -> None:
        """Sets the number of pieces that are done, and the remark. None keeps the remark."""
        self._progress.update(self._task, completed=done)
        if remark is not None:
            self._progress.update(self._task, remark=remark)


@contextmanager
def counted_pieces(
    console: Console, doing: str, total: int, *, pieces: str, remark: str
) -> Iterator[Callable[[int, str], None]]:
    """Shows a bar with remarks; without a terminal, prints a line every `LINE_EVERY` seconds.

    Args:
      pieces: what the pieces are called, for these lines.
      remark: the first remark.

    Yields a function to call with the number of pieces done and the next remark.
    """
    said = time.perf_counter()
    with Bar(console, doing, total, remark=remark) as bar:

        def advance(done: int, remark: str) -> None:
            nonlocal said
            bar.update(done, remark)
            if not bar.shown and time.perf_counter() - said > LINE_EVERY:
                said = time.perf_counter()
                console.print(f"{done} of {total} {pieces}, {remark}")

        yield advance


@contextmanager
def counted_bytes(console: Console, doing: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar that disappears at the end; without a terminal, prints one line with the total at the start.

    Yields a function to call with the bytes done so far and the bytes in all.
    """
    if not console.is_terminal:

        def line(done: int, total: int) -> None:
            if not done:
                console.print(f"{doing}: {total / 1e6:,.1f} MB", highlight=False, markup=False, soft_wrap=True)

        yield line
        return
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
