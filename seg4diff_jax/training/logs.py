"""What a run says: a progress bar (or lines, where there is no terminal), `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from seg4diff_jax.training.tensorboard import EventFile

METRICS = "metrics.jsonl"
BAR = (
    TextColumn("[bold]{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[values]}"),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


class Logs:
    """The logs of one run, as a context.

    Args:
      directory: of the run. Rows of `metrics.jsonl` past `start` were written by a run that was cut off, and go.
      name, steps, start: of the run: its task, its number of steps, and how many are done.
      writes: whether this process is the one that writes.
    """

    def __init__(self, directory: Path, *, name: str, steps: int, start: int, writes: bool = True):
        self._writes = writes
        self._console = Console(quiet=not writes, stderr=True)
        self._progress = Progress(*BAR, console=self._console, disable=not self._console.is_terminal or not writes)
        self._bar = self._progress.add_task(name, total=steps, completed=start, values="")
        self._steps, self._name = steps, name
        self._events = None
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
            _drop_rows_after(directory / METRICS, start)
            self._rows = (directory / METRICS).open("a", encoding="utf-8")
            self._events = EventFile(directory)

    def __enter__(self) -> Logs:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._events is not None:
            self._rows.close()
            self._events.close()

    def say(self, text: str) -> None:
        self._console.print(f"{self._name}: {text}", markup=False, highlight=False, soft_wrap=True)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Write values of a step; show them in the progress bar, or as a line where there is none.

        Names with an `@` are details, which are written and not shown.
        """
        shown = "  ".join(f"{key} {_shown(value)}" for key, value in values.items() if "@" not in key)
        self._progress.update(self._bar, completed=step, values=shown)
        if self._progress.disable:
            self.say(f"step {step} of {self._steps}  {shown}")
        if self._events is not None:
            finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
            self._rows.write(json.dumps({"step": step, **finite}) + "\n")
            self._rows.flush()
            self._events.scalars(step, values)

    def advance(self, step: int) -> None:
        self._progress.update(self._bar, completed=step)


def _shown(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = [row for line in path.read_text(encoding="utf-8").splitlines() if (row := _parsed(line))["step"] <= step]
    staged = path.with_suffix(".partial")
    staged.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    staged.replace(path)


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was killed
        return {"step": math.inf}


class Throughput:
    """Images per second of training alone: what else takes time is left out by `pause`."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._images, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def count(self, images: int) -> None:
        self._images += images

    def pause(self) -> None:
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()

    def take(self) -> float:
        """Since the last call."""
        self.pause()
        rate = self._images / max(self._seconds, 1e-9)
        self.restart()
        return rate
