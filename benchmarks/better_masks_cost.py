"""What better masks cost on SD3's shapes: class scores of one image by the expert block, with random weights.

    python benchmarks/better_masks_cost.py                              # 512 px, fp32
    python benchmarks/better_masks_cost.py --size 1024 --repeats 0      # floating-point operations alone
    python benchmarks/better_masks_cost.py --size 1024 --dtype bfloat16 # for a GPU

The base is the paper's masks of one prompt. Prompts beside it are what a long vocabulary needs, such as the three of
ADE20K's 150 classes: each a pass of its own, or as concepts beside one pass. Encoders, edges and labels are left out.
Times are medians of runs that take turns; operations are those of all matrix products.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from seg4diff_jax.class_maps import read_class_scores
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.encoders import segments
from seg4diff_jax.models.sd3.model import MMDiT, MMDiTConfig
from seg4diff_jax.passes import NoisedImages
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions

SD3_MEDIUM = {"num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192, "num_layers": 24}
CLASSES = 64
"""Rows of class scores of each prompt."""
WAYS: dict[str, tuple[int, MaskOptions]] = {
    "1 prompt": (1, PAPERS_MASKS),
    "1 prompt, 1 round": (1, MaskOptions(rounds=1)),
    "1 prompt, 3 rounds": (1, MaskOptions(rounds=3)),
    "1 prompt, 3 rounds by 6 heads": (1, MaskOptions(rounds=3, refine_heads=(0, 1, 2, 3, 4, 5))),
    "1 prompt as concepts": (1, MaskOptions(reading="concepts")),
    "3 prompts": (3, PAPERS_MASKS),
    "3 prompts as concepts": (3, MaskOptions(reading="concepts")),
}


def main(size: int = 512, block: int = 9, dtype: Literal["float32", "bfloat16"] = "float32", repeats: int = 5) -> None:
    """Measure.

    Args:
      size: side of the square image in pixels.
      block: the block that is read; the model holds no later one.
      dtype: of parameters and computation.
      repeats: runs of each; 0: count operations alone, which needs no memory for weights.
    """
    config = MMDiTConfig(**SD3_MEDIUM)
    types = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    make = lambda: MMDiT(config, depth=block + 1, **types, rngs=nnx.Rngs(0))
    model = nnx.jit(make)() if repeats else nnx.eval_shape(make)
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float32)
    texts = lambda rows: TextConditioning(normal(rows, 78, 4096), normal(rows, 2048), 77, segments(77, 77))
    latents, noise = normal(1, size // 8, size // 8, 16), normal(1, size // 8, size // 8, 16)
    programs, given, counted = {}, {}, {}
    for name, (prompts, masks) in WAYS.items():
        owner = jnp.zeros(prompts, jnp.int32) if masks.reading == "prompt" else None
        images = NoisedImages(latents, noise, jnp.float32(0.515), owner)
        beside = None if owner is not None else texts(1)
        given[name] = images, texts(prompts), jnp.abs(normal(prompts, CLASSES, 77)), beside
        traced = read_class_scores.trace(model, *given[name], block=block, masks=masks)
        counted[name], programs[name] = products(traced.jaxpr.jaxpr) / 1e12, traced.lower().compile()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(repeats + 1 if repeats else 0):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(model, *given[name]))
            if number:
                seconds[name].append(time.perf_counter() - start)
    table = Table(title=f"{(size // 16) ** 2} image tokens, {dtype} on {jax.devices()[0].device_kind}")
    for column in ("class scores", "TFLOP", "of 1 prompt", "seconds", "of 1 prompt", "temporary MiB"):
        table.add_column(column, justify="left" if column == "class scores" else "right")
    first = next(iter(WAYS))
    for name, program in programs.items():
        clock = ("-", "-")
        if repeats:
            median, base = (statistics.median(seconds[each]) for each in (name, first))
            clock = f"{median:.2f}", ratio(median, base)
        held = f"{program.memory_analysis().temp_size_in_bytes / 2**20:.0f}"
        table.add_row(name, f"{counted[name]:.3f}", ratio(counted[name], counted[first]), *clock, held)
    Console(highlight=False, width=120).print(table)
    print(f"jax {jax.__version__}, {repeats} runs each, medians")


def products(jaxpr: Any) -> int:
    """Counts the operations of all matrix products and convolutions, in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out = params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[out]
        inner = [each for value in params.values() for each in (value if isinstance(value, tuple | list) else [value])]
        bodies = [getattr(each, "jaxpr", each) for each in inner]
        times = params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(products(body) for body in bodies if hasattr(body, "eqns"))
    return total


def ratio(one: float, other: float) -> str:
    return f"{one / other:.3f} x"


if __name__ == "__main__":
    auto_cli(main)
