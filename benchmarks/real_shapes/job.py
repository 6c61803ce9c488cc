"""The inputs and the results of both sides of `zero_shot_real_shapes.py`, as files in one directory."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CLASS_TOKENS = (1, 1, 2, 1, 3, 1, 2, 1)
"""How many tokens each class of every prompt has; the first is at index 1."""
CLIP_TOKENS, CLIP_STATES = 77, 2048
STEP, SHIFT, SEED = 8, 3.0, 0


@dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
      transformer, vae: configurations, as published.
      block: whose attention is read.
      repeats: timed passes of each side.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]
    size: int
    dtype: str
    block: int
    repeats: int

    @classmethod
    def read(cls, directory: Path) -> Job:
        return cls(**json.loads((directory / "job.json").read_text()))

    def write(self, directory: Path) -> None:
        (directory / "job.json").write_text(json.dumps(asdict(self)))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.size // 2 ** (len(self.vae["block_out_channels"]) - 1)
        return side, side, self.vae["latent_channels"]


def random_inputs(job: Job, images: int) -> dict[str, np.ndarray]:
    """Pixels in [-1, 1] [images, size, size, 3], prompt states and pooled states: no text encoder is run."""
    rng = np.random.default_rng(SEED)
    coarse = rng.standard_normal((images, 16, 16, 3)).repeat(job.size // 16, 1).repeat(job.size // 16, 2)
    pixels = np.tanh(coarse + 0.1 * rng.standard_normal((images, job.size, job.size, 3)))
    context = np.zeros((images, 2 * CLIP_TOKENS, job.transformer["joint_attention_dim"]))
    states = min(CLIP_STATES, context.shape[-1])
    context[:, :CLIP_TOKENS, :states] = rng.standard_normal((images, CLIP_TOKENS, states))
    pooled = rng.standard_normal((images, job.transformer["pooled_projection_dim"]))
    named = {"pixels": pixels, "context": context, "pooled": pooled}
    return {name: array.astype(np.float32) for name, array in named.items()}


class Taken(NamedTuple):
    """Seconds on the wall's clock, and of the processors that the process has kept busy."""

    wall: float
    processor: float


class Clock:
    """Times things, and waits for them.

    Args:
      wait: returns when what it is given is there.
      processor: let processor seconds decide where one number is asked for: on a CPU other programs hardly change them.
    """

    def __init__(self, wait: Callable[[Any], Any], processor: bool):
        self.wait, self.processor = wait, processor

    def each(self, work: Callable[[], Any], repeats: int) -> list[Taken]:
        """Of every one of some repetitions, after one that is not counted."""
        self.wait(work())
        return [self.once(work) for _ in range(repeats)]

    def once(self, work: Callable[[], Any]) -> Taken:
        start = self.now()
        self.wait(work())
        end = self.now()
        return Taken(end.wall - start.wall, end.processor - start.processor)

    def now(self) -> Taken:
        return Taken(time.perf_counter(), time.process_time())

    @property
    def unit(self) -> str:
        return "processor s" if self.processor else "s"

    def deciding(self, taken: Taken) -> float:
        return taken.processor if self.processor else taken.wall

    def median(self, work: Callable[[], Any], repeats: int) -> float:
        return statistics.median(self.deciding(taken) for taken in self.each(work, repeats))

    def least(self, work: Callable[[], Any], repeats: int) -> float:
        return min(self.deciding(taken) for taken in self.each(work, repeats))


def forget_peak_memory() -> None:
    """From here on the peak is that of what runs, without loading (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of memory includes loading")


def peak_resident() -> int:
    """Bytes that this process has held in main memory at once."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def load_average() -> float:
    return os.getloadavg()[0]


def hand_back(directory: Path, name: str, figures: dict[str, Any], **arrays: np.ndarray) -> None:
    np.savez(directory / f"{name}.npz", **arrays)  # pyright: ignore[reportArgumentType]
    (directory / f"{name}.json").write_text(json.dumps(figures))
