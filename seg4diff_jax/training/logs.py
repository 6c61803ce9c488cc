"""The logs of a run: a progress bar (lines where there is no terminal), `metrics.jsonl`, TensorBoard, pictures."""

from __future__ import annotations

import io
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import parse_object
from seg4diff_jax.image_files import ImageError, read_rgb
from seg4diff_jax.terminal import Bar
from seg4diff_jax.training.errors import TrainingError

METRICS, PICTURES = "metrics.jsonl", "pictures"
STRIP = 12
"""Height, in pixels, of the strip above a row of pictures that shows its step."""


class Logs:
    """The logs of one run, as a context manager.

    Args:
      directory: directory of the run. Rows and pictures of steps after `start` come from a run that was killed. They
        are removed, and marked as void for TensorBoard.
      name: name of the task.
      steps: number of the run's steps.
      start: how many steps are done.
      writes: whether this process writes the logs.
    """

    def __init__(self, directory: Path, *, name: str, steps: int, start: int, writes: bool = True):
        self._writes = writes
        self._console = Console(quiet=not writes, stderr=True)
        self._bar = Bar(self._console, name, steps, done=start, remark="", elapsed=True)
        self._steps, self._name = steps, name
        self._begun: tuple[int, float] | None = None
        self._events, self._directory = None, directory
        if writes:
            from seg4diff_jax.training.tensorboard import EventFile  # imports PyTorch where that is installed

            with _at_its_start(directory):
                directory.mkdir(parents=True, exist_ok=True)
                _drop_rows_after(directory / METRICS, start)
                _drop_pictures_after(directory / PICTURES, start)
                self._rows = (directory / METRICS).open("a", encoding="utf-8")
                cut_off = any(directory.glob("events.out.tfevents.*"))
                self._events = EventFile(directory)
                if cut_off:
                    self._events.restarted(start + 1)
        self._pictures = directory / PICTURES
        self._left_out: set[Path] = set()

    def __enter__(self) -> Logs:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._events is not None:
            with suppress(OSError):  # a full disk has been reported
                self._rows.close()
            with suppress(OSError):
                self._events.close()

    def say(self, text: str) -> None:
        self._console.print(f"{self._name}: {text}", markup=False, highlight=False, soft_wrap=True)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values of a step, and shows them in the progress bar, or as a line where there is no bar.

        Names with an `@` are details, which are written and not shown.
        """
        self.show(step, values)
        if self._events is not None:
            finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
            with self._written(step):
                self._rows.write(json.dumps({"step": step, **finite}) + "\n")
                self._rows.flush()
                self._events.scalars(step, values)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows values of a step without writing them."""
        shown = "  ".join(f"{key} {_shown(value)}" for key, value in values.items() if "@" not in key)
        self._bar.update(step, shown)
        if not self._bar.shown:
            self.say(f"step {step} of {self._steps}  {shown}{self._left(step)}")

    @contextmanager
    def _written(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{error.filename or self._directory}: the log of step {step} could not be written "
                f"({error.strerror or error}); checkpoints up to now are intact. Make room on the disk, then continue "
                "with --resume"
            ) from error

    def _left(self, step: int) -> str:
        """Returns the time that is left, from the pace since the first step, evaluations and checkpoints included."""
        if self._begun is None or step <= self._begun[0] or step >= self._steps:
            return ""
        first, begun = self._begun
        seconds = (time.perf_counter() - begun) / (step - first) * (self._steps - step)
        return f"  {timedelta(seconds=round(seconds))} left"

    def picture(self, step: int, pixels: UInt8[np.ndarray, "height width 3"]) -> None:
        """Writes the picture of a step, and stacks the pictures of all steps in `pictures.png`.

        An earlier picture that cannot be read is left out of `pictures.png`, and the run says so.
        """
        if self._events is None:
            return
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        with self._written(step):
            self._pictures.mkdir(exist_ok=True)
            (self._pictures / f"{step:08d}.png").write_bytes(encoded.getvalue())
            self._events.image(step, "pictures", encoded.getvalue(), *pixels.shape[:2])
            self._sheet().save(self._pictures.with_suffix(".png"))

    def _sheet(self) -> Image.Image:
        rows = []
        for number, file in _pictures(self._pictures):
            try:
                rows.append((str(number), Image.fromarray(read_rgb(file, str(file)))))
            except (ImageError, FileNotFoundError) as error:
                if file not in self._left_out:
                    self.say(f"{error}; it is left out of {self._pictures.name}.png")
                self._left_out.add(file)
        height = sum(STRIP + row.height for _, row in rows)
        sheet = Image.new("RGB", (max(row.width for _, row in rows), height), "white")
        top = 0
        for said, row in rows:
            ImageDraw.Draw(sheet).text((2, top), said, fill="black", font=ImageFont.load_default(STRIP - 2))
            sheet.paste(row, (0, top + STRIP))
            top += STRIP + row.height
        return sheet

    def advance(self, step: int) -> None:
        self._begun = self._begun or (step, time.perf_counter())
        self._bar.update(step)


def _shown(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


@contextmanager
def _at_its_start(directory: Path) -> Iterator[None]:
    """Raises TrainingError, which names the file, when logs cannot be written, or rows and pictures not removed."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{error.filename or directory}: logs cannot be kept here ({error.strerror or error}): move it elsewhere, "
            "checkpoints do not need it, or give another run.out"
        ) from error


def _drop_rows_after(path: Path, step: int) -> None:
    """Removes the rows after a step, and a last line that a killed run did not finish.

    Raises:
      TrainingError: the file has other damage.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines()
    rows = [_parsed(line) for line in lines]
    if wrong := [number for number, row in enumerate(rows[:-1], 1) if row is None]:
        raise TrainingError(
            f"{path} is damaged: line {wrong[0]} is no row of a log (a JSON object with its step). Mend or remove the "
            "line, or move the file elsewhere; checkpoints do not need it"
        )
    staged = path.with_suffix(".partial")
    kept = [line + b"\n" for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= step]
    staged.write_bytes(b"".join(kept))
    staged.replace(path)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_object(line, METRICS)
    except CheckpointError:
        return None
    return row if type(row.get("step")) is int else None


def _drop_pictures_after(directory: Path, step: int) -> None:
    for number, file in _pictures(directory):
        if number > step:
            file.unlink()


def _pictures(directory: Path) -> list[tuple[int, Path]]:
    """Returns the steps that have a picture, ascending, with their files. Other files are left out."""
    return sorted((int(file.stem), file) for file in directory.glob("*.png") if re.fullmatch("[0-9]+", file.stem))


class Throughput:
    """Measures images per second of training alone. `pause` excludes the time of other work."""

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

    def take(self) -> float | None:
        """Returns images per second since the last call; None if none were counted."""
        self.pause()
        rate = self._images / max(self._seconds, 1e-9) if self._images else None
        self.restart()
        return rate
