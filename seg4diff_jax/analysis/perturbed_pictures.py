"""Pictures of prompts with one block perturbed at a time, beside those of the plain model (Seg4Diff, 3.3 and A.3).

All pictures of a prompt and a seed begin with the same noise. Every combination of prompt, seed and block is a row of a
batch, and the plain model is a row without perturbed blocks, so one compiled program makes them all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypedDict, Unpack

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from seg4diff_jax.flow import Sampler
from seg4diff_jax.models.perturbation import Perturbation
from seg4diff_jax.numerics import settled
from seg4diff_jax.passes import finite_pictures
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.pipeline_options import RunOptions
from seg4diff_jax.sampling import sample_latents


class Variant(NamedTuple):
    """One picture: of a prompt by its position in the whole list, under a seed, with a block perturbed, or None."""

    place: int
    seed: int
    block: int | None


class PlainOptions(TypedDict, total=False):
    """Options of the generating runs, which `pipeline_options.RunSettings` explains."""

    steps: int
    guidance: float
    size: tuple[int, int] | None
    sampler: Sampler | None


def variants(prompts: int, seeds: Sequence[int], blocks: Sequence[int], *, first: int = 0) -> list[Variant]:
    """Returns all pictures of so many prompts, prompt by prompt and seed by seed, the unperturbed one first."""
    return [
        Variant(place, seed, block)
        for place in range(first, first + prompts)
        for seed in seeds
        for block in (None, *blocks)
    ]


def perturbed_pictures(
    pipe: Pipeline,
    prompts: Sequence[str],
    perturb: Perturbation,
    *,
    scale: float | None = None,
    seeds: Sequence[int] = (0,),
    first: int = 0,
    batch: int = 4,
    done: Collection[Variant] = (),
    **options: Unpack[PlainOptions],
) -> Iterator[tuple[Variant, UInt8[np.ndarray, "height width 3"]]]:
    """Yields the unperturbed picture of each prompt and seed, and those with each block perturbed, as they are made.

    Args:
      perturb: what is done to a block. Each of its blocks is perturbed by itself.
      scale: the pictures are guided away from the perturbed prediction (`perturbed_guidance`). None: the runs
        themselves are perturbed.
      seeds: of the noise. A picture's noise depends on the seed and on the prompt's position alone.
      first: position of the first of these prompts in a list.
      batch: rows that are made at once. The last batch is padded.
      done: pictures to leave out. Which rows share a batch does not depend on them.
      options: of the runs.

    Raises:
      ValueError: as `Pipeline.generate`; or there is no prompt or no seed, or the perturbation changes nothing.
      FloatingPointError: pixels are not finite: damaged weights.
    """
    if not prompts or not seeds or batch < 1:
        found = f"{len(prompts)} prompts, {len(seeds)} seeds and batches of {batch}"
        raise ValueError(f"{found}; expected at least one of each")
    if perturb.is_nothing:
        raise ValueError("a blur of sigma 0 or of one tap changes nothing: choose a wider one")
    rows = variants(len(prompts), seeds, perturb.blocks, first=first)
    batch, left = min(batch, len(rows)), frozenset(rows).difference(done)
    for start in range(0, len(rows), batch):
        own = rows[start : start + batch]
        if left.isdisjoint(own):
            continue
        filled = own + own[-1:] * (batch - len(own))
        texts = [prompts[row.place - first] for row in filled]
        made = _batch(pipe, filled, texts, perturb, scale, options)
        yield from ((row, picture) for row, picture in zip(own, made, strict=False) if row in left)


@settled()
def _batch(
    pipe: Pipeline,
    rows: Sequence[Variant],
    prompts: Sequence[str],
    perturb: Perturbation,
    scale: float | None,
    options: PlainOptions,
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Returns the pictures of one batch. `prompts` has one for each row."""
    for prompt in dict.fromkeys(prompts):
        pipe.encode_prompts(prompt)  # by itself, and kept: several at once would differ in the last digits
    size = pipe.view.size((0, 0), options.get("size"), "square")
    noise = [np.asarray(pipe.view.noise(None, [row.place], 1, size, row.seed))[0] for row in rows]
    own: RunOptions = {"size": size, "noise": np.stack(noise), "perturb": perturb, "perturbed_guidance": scale}
    run = pipe.generating_run(prompts, **{**options, **own})
    blocks = np.array([np.arange(pipe.transformer.depth) == row.block for row in rows])
    assert run.perturbed is not None
    run = replace(run, perturbed=replace(run.perturbed, blocks=jnp.asarray(blocks)))
    with pipe.settings():
        return finite_pictures(pipe.vae, sample_latents(pipe.transformer, run))
