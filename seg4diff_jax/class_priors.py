"""Measures how much attention each class's words draw on average, on pictures that nobody labelled; keeps it in a file.

{"model": "miniature", "pictures": 500, "block": 3, "step": 3, "means": {"ball": 0.0123, ...}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from seg4diff_jax.batching import finite_maps
from seg4diff_jax.class_grids import class_grids
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.images import ImageInput, Resize
from seg4diff_jax.numerics import settled
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.pipeline_options import checked_block
from seg4diff_jax.quoting import quoted
from seg4diff_jax.segmentation.class_prior import ClassPrior
from seg4diff_jax.text import class_prompts

KEYS = {"means": dict, "block": int, "step": int, "pictures": int}
EXPECTED = "expected what `seg4diff class-prior` wrote"


@settled()
def measure_class_prior(
    pipe: Pipeline,
    pictures: Sequence[ImageInput],
    classes: Sequence[str],
    *,
    block: int | None = None,
    step: int | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    resize: Resize = "aspect",
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda done: None,
) -> ClassPrior:
    """Returns the mean attention to each class's words over pictures, all classes asked for in each.

    Args:
      pictures: as for `Pipeline.segment`. A hundred are enough for the miniature; they need no labels.
      classes: the names of all classes that will be asked for.
      batch_size: pictures at a time. Each has noise of its own, by its place among all.
      on_progress: receives how many are done.
      block, step, seed, size, resize: as for `Pipeline.segment`.

    Raises as `Pipeline.segment` does, and ValueError when there is no picture, or a class draws no attention at all.
    """
    if not len(pictures):
        raise ValueError("expected at least one picture to measure the class prior on, found none")
    block = checked_block(block, pipe.expert_block, pipe.transformer.depth)
    prompts, total = class_prompts(pipe.tokenizers, classes), np.zeros(len(classes))
    for start in range(0, len(pictures), batch_size):
        some = pictures[start : start + batch_size]
        for group in pipe.view.by_size(some, size, resize):
            placed = group._replace(places=[start + place for place in group.places])
            (views,) = pipe.noised(placed, len(pictures), (seed,), None, step)
            how = {"encode": pipe.encode_prompts, "spread": pipe.spread, "block": block}
            with pipe.settings():
                grids = class_grids(pipe.transformer, views, [prompts] * len(group.places), **how)
            total += sum(finite_maps(grid, block).mean(axis=(1, 2), dtype=np.float64) for grid in grids)
        on_progress(min(start + batch_size, len(pictures)))
    means = dict(zip(prompts.classes, (total / len(pictures)).tolist(), strict=True))
    return ClassPrior(means, block, pipe.expert_step if step is None else step, len(pictures))


def write_class_prior(path: Path, prior: ClassPrior, model: str) -> None:
    """Writes a prior as JSON, numbers to seven digits."""
    rounded = {name: float(f"{mean:.7g}") for name, mean in prior.means.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"model": model, **asdict(prior), "means": rounded}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_class_prior(file: str | Path) -> ClassPrior:
    """Reads what `write_class_prior` wrote. Raises CheckpointError, which names the file, for anything else."""
    path = Path(file).expanduser()
    found = read_json(path, EXPECTED)
    for name, kind in KEYS.items():
        if not isinstance(value := found.get(name), kind) or isinstance(value, bool):
            raise CheckpointError(f"{path}: {name} is {quoted(value)}; {EXPECTED}")
    means = found["means"]
    if wrong := [name for name, mean in means.items() if isinstance(mean, bool) or not isinstance(mean, (int, float))]:
        raise CheckpointError(f"{path}: the mean of {quoted(wrong[0])} is {quoted(means[wrong[0]])}; {EXPECTED}")
    try:
        each = {name: float(mean) for name, mean in means.items()}
        return ClassPrior(each, found["block"], found["step"], found["pictures"])
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}; {EXPECTED}") from None
