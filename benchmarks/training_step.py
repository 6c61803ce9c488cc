"""Measures a flow-matching step of the miniature's MM-DiT, with and without the options that make it fast.

    python benchmarks/training_step.py
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/training_step.py      # huge pages for XLA's buffers, Linux

Latents and contexts are random. A step is forward pass, gradient and AdamW. The variants alternate, and the median of
each is shown.
"""

from __future__ import annotations

import os
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml
from flax import nnx
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from seg4diff_jax.models.attention import ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.model import MMDiT, MMDiTConfig

CONFIG = Path(__file__).parents[1] / "configs" / "miniature" / "flow_matching.yaml"
TEXT, ABSENT_T5 = 154, 77
VARIANTS = {
    "every token, attention in chunks": (1, None),
    "T5's zeros computed once": (ABSENT_T5, None),
    "and attention in one chunk": (ABSENT_T5, Kernel("xla", query_chunk=4096)),
}


def main(batch: int = 32, repeats: int = 5) -> None:
    """Measure.

    Args:
      batch: scenes in a step.
      repeats: steps of each variant.
    """
    config = MMDiTConfig(**yaml.safe_load(CONFIG.read_text())["model"])
    side = config.sample_size
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((batch, *shape)), jnp.float32)
    context = draw(TEXT, config.joint_attention_dim).at[:, -ABSENT_T5:].set(0)
    inputs = draw(side, side, config.in_channels), jnp.full(batch, 300.0), context, draw(config.pooled_projection_dim)
    table = Table("variant", "dtype", "ms a step", "scenes/s", title=os.environ.get("GLIBC_TUNABLES", "no tunables"))
    for dtype in ("float32", "bfloat16"):
        steps = {name: compiled_step(config, dtype, *variant) for name, variant in VARIANTS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(repeats + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                jax.block_until_ready(step(*inputs))
                if turn:  # the first turn compiles
                    seconds[name].append(time.perf_counter() - start)
        for name, taken in seconds.items():
            median = statistics.median(taken)
            table.add_row(name, dtype, f"{1000 * median:.0f}", f"{batch / median:.1f}")
    Console().print(table, f"batch {batch}, {jax.devices()[0].device_kind}, jax {jax.__version__}", sep="\n")


def compiled_step(config: MMDiTConfig, dtype: str, equal: int, kernel: Kernel | None):
    """A function of the inputs that takes one step of its own parameters."""
    structure, parameters = nnx.split(MMDiT(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    optimizer = optax.adamw(1e-3)
    state = [parameters, optimizer.init(parameters)]

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters, moments, latents, timesteps, context, pooled):
        def loss(parameters):
            texts, options = TextConditioning.from_full(context, pooled, equal), ForwardOptions(kernel=kernel)
            velocity, _ = nnx.merge(structure, parameters)(latents, timesteps, texts, options=options)
            return jnp.square(velocity - latents).mean()

        updates, moments = optimizer.update(jax.grad(loss)(parameters), moments, parameters)
        return optax.apply_updates(parameters, updates), moments

    def run(*inputs):
        state[:] = step(*state, *inputs)
        return state[0]

    return run


if __name__ == "__main__":
    auto_cli(main)
