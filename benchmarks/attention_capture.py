"""Measures the cost of looking at attention: time and memory of a forward pass that captures it and one that does not.

Maps are captured of one block; statistics (shares of attention, value norms, similarities) and principal components of
all blocks.

    python benchmarks/attention_capture.py                       # SD3-medium's width and depth, 512 px, fp32
    python benchmarks/attention_capture.py --size 1024 --dtype bfloat16

Weights are random. The two kinds of passes alternate, so that other load on the machine affects both; the median is
shown. Memory is XLA's figure for temporary buffers.
"""

from __future__ import annotations

import statistics
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from seg4diff_jax.analysis.block_statistics import StatisticsReader
from seg4diff_jax.analysis.principal_components import ComponentsReader
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.encoders import segments
from seg4diff_jax.models.kernels import default_kernel
from seg4diff_jax.models.sd3.model import MMDiT, MMDiTConfig
from seg4diff_jax.models.trunk import attention_at

SD3_MEDIUM = {"num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
REQUESTS = {
    "no capture": None,
    "scores and probabilities, heads averaged": AttentionRequest(mean_heads=True),
    "scores and probabilities, heads kept": AttentionRequest(),
}


GROUPS = (1, 8, 1, 67, 8, 1, 68)
"""Tokens of CLIP's start, prompt, end and padding, and of T5's prompt, end and padding."""


def main(
    size: int = 512,
    layers: int = 24,
    block: int = 9,
    batch: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    repeats: int = 5,
) -> None:
    """Measure.

    Args:
      size: side of the square image in pixels.
      layers: number of blocks.
      block: the captured block.
      batch: images at once.
      dtype: of parameters and computation.
      repeats: passes of each kind.
    """
    config = MMDiTConfig(**SD3_MEDIUM, num_layers=layers)
    model = nnx.jit(lambda: MMDiT(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((batch, *shape)), jnp.float32)
    inputs = (
        draw(size // 8, size // 8, 16),
        jnp.full(batch, 515.072),
        TextConditioning(draw(154, 4096), draw(2048), segments=segments(77, 77)),
    )

    def forward(request):
        capture = () if request is None else (block,)
        return lambda model, *x: model(*x, capture=capture, options=ForwardOptions(request))

    def all_statistics(model, *x):
        group = jnp.repeat(jnp.arange(7), jnp.array(GROUPS), total_repeat_length=154)
        reader = StatisticsReader(jnp.broadcast_to(jax.nn.one_hot(group, 7).T, (batch, 7, 154)))
        return model(*x, capture=range(layers), options=ForwardOptions(reader))

    def all_components(model, *x):
        return model(*x, capture=range(layers), options=ForwardOptions(ComponentsReader()))

    programs = {name: forward(request) for name, request in REQUESTS.items()}
    programs |= {"statistics of all blocks": all_statistics, "principal components of all blocks": all_components}
    programs[f"nothing after block {block}"] = lambda model, *x: attention_at(
        model, *x, block=block, options=ForwardOptions(REQUESTS["scores and probabilities, heads averaged"])
    )
    compiled, compile_seconds = {}, {}
    for name, program in programs.items():
        start = time.perf_counter()
        compiled[name] = jax.jit(program).lower(model, *inputs).compile()
        compile_seconds[name] = time.perf_counter() - start
        jax.block_until_ready(compiled[name](model, *inputs))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(model, *inputs))
            seconds[name].append(time.perf_counter() - start)

    device, kernel = jax.devices()[0].device_kind, default_kernel(jnp.dtype(dtype), MMDiTConfig.attention_head_dim).name
    tokens = (size // 16) ** 2 + 154
    table = Table(title=f"{layers} blocks, {tokens} tokens, batch {batch}, {dtype}, {kernel} on {device}")
    for column in ("forward pass", "seconds", "of no capture", "temporary MiB", "of no capture", "compile seconds"):
        table.add_column(column, justify="left" if column == "forward pass" else "right")
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()}
    base = statistics.median(seconds["no capture"])
    for name in compiled:
        median = statistics.median(seconds[name])
        more_time, more_memory = median / base, memory[name] / memory["no capture"]
        table.add_row(
            name,
            f"{median:.3f}",
            f"{100 * more_time:.1f} %",
            f"{memory[name] / 2**20:.0f}",
            f"{100 * more_memory:.1f} %",
            f"{compile_seconds[name]:.1f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"one array of tokens x tokens, all heads, fp32: {batch * 24 * tokens**2 * 4 / 2**20:.0f} MiB")
    console.print(f"jax {jax.__version__}, {repeats} passes each, medians")


if __name__ == "__main__":
    auto_cli(main)
