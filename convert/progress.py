"""How far a long job is: told in bytes, shown as a bar at a terminal and as a line elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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


@contextmanager
def shown(console: Console, doing: str) -> Iterator[Told]:
    """A bar that goes when the block ends; where there is no terminal, one line with the total when it begins."""
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
