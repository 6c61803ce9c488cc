"""What the paper is reproduced on: a model, prompts, labelled images, and how much of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seg4diff_jax.analysis.picture_scores import PictureScorers
from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.pipeline import Pipeline

OnProgress = Callable[[float], None]
"""Receives the part of a step that is done, 0 to 1."""
STEPS, GUIDANCE = 28, 7.5
"""Of generating runs, as in the paper."""
SHOWN_LEVELS = 8, 28
"""The noise levels at which the paper shows generating runs, counted from the clean end of 28."""


@dataclass(frozen=True)
class Subject:
    """A model and what it is looked at with.

    Attributes:
      name: the model's, as the user gave it.
      checkpoint, pipe: the model, without adapters.
      prompts: of the pictures that are generated.
      benchmark: labelled images.
      scorers: the models that judge pictures; None: nothing judges them.
      levels: noise levels that are swept for masks, counted from the clean end of 28.
      seeds: of the noise, where one figure takes several.
      batch_size: images at a time.
      adapters: MAGNET's adapters; None: the miniature's are trained, others have none.
    """

    name: str
    checkpoint: Checkpoint
    pipe: Pipeline
    prompts: tuple[str, ...]
    benchmark: Benchmark
    scorers: PictureScorers | None = None
    levels: tuple[int, ...] = (1, 3, 8, 14, 21, 28)
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 8
    adapters: Path | None = None

    @property
    def blocks(self) -> range:
        return range(self.pipe.transformer.depth)

    @property
    def expert(self) -> int:
        """The checkpoint's own expert block."""
        assert self.pipe.expert_block is not None, "checked before the run"
        return self.pipe.expert_block

    def prompt_batches(self) -> list[range]:
        """Places of the prompts, a batch each."""
        count, size = len(self.prompts), self.batch_size
        return [range(start, min(start + size, count)) for start in range(0, count, size)]
