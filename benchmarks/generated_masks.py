"""Measures what masks cost a generating run that they are read in: seconds with them and without.

    python benchmarks/generated_masks.py                 # the miniature, and 4 random blocks of SD3-medium's width
    python benchmarks/generated_masks.py --layers 24 --size 512

Of the miniature a whole `Pipeline.generate` is timed. Of the random blocks it is the sampling alone, with neither text
encoders nor autoencoder, whose seconds would hide what masks cost. The two kinds of runs alternate, and which of them
comes first, so that other load on the machine affects both; the processor's own seconds stand beside the clock's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

import seg4diff_jax as s4d
from seg4diff_jax.flow import FlowSchedule
from seg4diff_jax.generated_masks import Words, mask_step, segmented
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.encoders import segments
from seg4diff_jax.models.sd3.model import MMDiT, MMDiTConfig
from seg4diff_jax.passes import MEAN_PROBS
from seg4diff_jax.sampling import GeneratingRun, Looking, sample_latents, sample_looking

SD3_MEDIUM = {"num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
PROMPT, NAMES = "a star on grass", ("star", "grass")
CLOCKS = {"the clock": time.perf_counter, "the processor": time.process_time}


def main(size: int = 256, layers: int = 4, steps: int = 4, repeats: int = 9, miniature_repeats: int = 25) -> None:
    """Measure.

    Args:
      size: side of the random blocks' square picture in pixels.
      layers: number of random blocks; the middle one is read.
      steps: of their run. The miniature's has 28.
      repeats: runs of each kind.
      miniature_repeats: the miniature's, which are short.
    """
    table = Table(title=f"{jax.devices()[0].device_kind}, jax {jax.__version__}, fp32; medians")
    for column in ("run", "runs of each", "seconds of", "without masks", "with masks", "ratio", "of least"):
        table.add_column(column, justify="left" if column == "run" else "right")
    kinds = {
        "miniature, 64 px, 28 steps": (*of_the_miniature(), miniature_repeats),
        f"{layers} blocks, {size} px, {steps} steps": (*of_random_blocks(size, layers, steps), repeats),
    }
    for name, (without, with_masks, count) in kinds.items():
        seconds = alternating(without, with_masks, count)
        for place, clock in enumerate(CLOCKS):
            plain, masked = ([each[place] for each in runs] for runs in seconds)
            medians = statistics.median(plain), statistics.median(masked)
            ratios = medians[1] / medians[0], min(masked) / min(plain)
            table.add_row(
                name, str(count), clock, *(f"{each:.4f}" for each in medians), *(f"{each:.3f}" for each in ratios)
            )
    Console(width=120).print(table)


def alternating(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> list[list[list[float]]]:
    """Returns the seconds of each run of both by each of the clocks, after a run that compiles."""
    seconds: dict[Callable[[], Any], list[list[float]]] = {first: [], second: []}
    for repeat in range(-1, repeats):
        for run in (first, second) if repeat % 2 else (second, first):
            start = [now() for now in CLOCKS.values()]
            jax.block_until_ready(run())
            if repeat >= 0:
                seconds[run].append([now() - then for now, then in zip(CLOCKS.values(), start, strict=True)])
    return [seconds[first], seconds[second]]


def of_the_miniature() -> tuple[Callable[[], Any], Callable[[], Any]]:
    pipe = s4d.load("miniature", dtype="float32")
    return lambda: pipe.generate(PROMPT), lambda: [pipe.generate(PROMPT, segment=NAMES)[0]]


def of_random_blocks(size: int, layers: int, steps: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    config = MMDiTConfig(**SD3_MEDIUM, num_layers=layers)
    model = nnx.jit(lambda: MMDiT(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((1, *shape)), jnp.float32)
    text = lambda: TextConditioning(draw(154, 4096), draw(2048), segments=segments(77, 77))
    sigmas = jnp.asarray(FlowSchedule().sigmas(steps), jnp.float32)
    run = GeneratingRun(draw(size // 8, size // 8, 16), text(), sigmas, (text(), jnp.float32(7)))
    looking = Looking((layers // 2,), (steps - mask_step(None, 8, steps),))
    words = Words(PROMPT, NAMES, (np.array([2]), np.array([4])))

    def with_masks() -> jax.Array:
        latents, records = sample_looking(model, run, MEAN_PROBS, looking=looking)
        maps = np.asarray(records[looking.blocks[0]].probs)[0, 0]
        segmented(maps, (size // 16, size // 16), (size, size), words)
        return latents

    return lambda: sample_latents(model, run), with_masks


if __name__ == "__main__":
    auto_cli(main)
