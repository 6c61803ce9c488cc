"""What a reader keeps of blocks in the run that generates one picture, at chosen noise levels, and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, Unpack

import jax
import numpy as np
from jaxtyping import UInt8

from seg4diff_jax.models.attention import Reader
from seg4diff_jax.passes import finite_pictures
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.pipeline_options import RunOptions, RunSettings
from seg4diff_jax.sampling import Looking, sample_looking

Record = TypeVar("Record")


class GeneratedRecords(NamedTuple):
    """A picture and what was read on the way to it.

    Attributes:
      levels: records by noise level, then by block; arrays have a leading axis of 1, for the picture.
      grid: rows and columns of image tokens.
    """

    picture: UInt8[np.ndarray, "height width 3"]
    levels: dict[int, dict[int, Any]]
    grid: tuple[int, int]


def generating_records(
    pipe: Pipeline,
    prompt: str,
    reader: Reader,
    *,
    blocks: Sequence[int],
    levels: Sequence[int],
    **options: Unpack[RunOptions],
) -> GeneratedRecords:
    """Generates one picture and returns what a reader keeps of blocks, of the half that follows the prompt.

    Args:
      levels: noise levels, counted as steps: 1 is the last one, `steps` pure noise.
      options: of the run, see `pipeline_options.RunSettings`.

    Raises:
      ValueError: an option is not usable, or the run has no such step.
      FloatingPointError: the picture is not finite: damaged weights.
    """
    run, steps = pipe.generating_run([prompt], **options), RunSettings(**options).steps
    taken = len(run.sigmas)
    if beyond := [level for level in levels if not 1 <= level <= taken]:
        expected = f"expected 1 (the last) to {taken} (the first)"
        raise ValueError(f"step {beyond[0]} is not of this run of {steps}: {expected}")
    looking = Looking(tuple(blocks), tuple(taken - level for level in levels))
    with pipe.settings():
        latents, records = sample_looking(pipe.transformer, run, reader, looking=looking)
        (picture,) = finite_pictures(pipe.vae, latents)
    patch = pipe.transformer.config.patch_size
    of_level = lambda place: {block: jax.tree.map(lambda leaf: leaf[place], each) for block, each in records.items()}
    found = {level: of_level(place) for place, level in enumerate(levels)}
    return GeneratedRecords(picture, found, (run.latents.shape[1] // patch, run.latents.shape[2] // patch))
