"""Measures a MAGNET training step: ours, and the release's in PyTorch on diffusers and PEFT, at equal batch and shapes.

    PYTHONPATH=. python benchmarks/magnet_step.py                                            # CPU: 6 blocks, 256 px
    PYTHONPATH=. python benchmarks/magnet_step.py --case.layers=24 --case.size=1024 --case.batch=4 \\
        --case.dtype=bfloat16 --case.remat=blocks                                            # GPU: SD3-medium whole

Weights are random, with SD3's widths. A step encodes pictures to latents (not in `ours, cached`), draws noise, runs the
whole transformer, and computes the losses of velocity and masks, the gradients of the adapters, clipping and AdamW.
Text encoders are left out on both sides. The released step keeps the expert block's whole score matrix beside its fused
attention, computes with T5's zeros, and encodes every picture in every step; its weights are fp32, with fp16 autocast
on a GPU. Each variant runs in a process of its own. For ours the table also has the memory that the compiled step takes
beside its arguments (temp.), and on a CPU the memory of the process before its first step (begun). `of peak` is the
rate of the operations that the gradients need, without recomputation, relative to the rate that each side's library
reaches, in its dtype, in a product of large square matrices.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

CLIP, ZEROS = 77, 77
WIDTHS = {"sd3": 24, "sd3.5-large": 38}
"""Heads of 64."""
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "shift": 0.0609}
SCALING = 1.5305
RATE, DECAY, CLIP_NORM = 1e-4, 1e-4, 0.01
Variant = Literal["release", "ours", "ours, cached"]
VARIANTS: tuple[Variant, ...] = ("release", "ours", "ours, cached")


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
      layers: blocks, at SD3-medium's 24 the whole; width_of: whose blocks.
      size: side of the pictures; batch: how many; masks: of each; names have three tokens.
      dtype, remat: ours; the release's are fixed, without recomputation.
      repeats: steps, of which the median is told; one more warms up.
    """

    layers: int = 6
    width_of: Literal["sd3", "sd3.5-large"] = "sd3"
    size: int = 256
    batch: int = 2
    masks: int = 8
    rank: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["nothing", "blocks", "all_but_matmuls"] = "nothing"
    repeats: int = 3

    @property
    def block(self) -> int:
        """Where SD3-medium's expert is, in proportion."""
        return 9 * self.layers // 24

    def transformer(self) -> dict[str, Any]:
        heads = WIDTHS[self.width_of]
        sizes = {"sample_size": 128, "pos_embed_max_size": 192, "in_channels": 16, "out_channels": 16, "patch_size": 2}
        widths = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "caption_projection_dim": 64 * heads}
        return sizes | widths | {"num_layers": self.layers, "num_attention_heads": heads, "attention_head_dim": 64}

    def needed(self, *, cached: bool) -> int:
        """Operations that a step's gradients need."""
        from seg4diff_jax.models.flops import adapter_step_flops, vae_encoder_flops
        from seg4diff_jax.models.lora import LoRAConfig
        from seg4diff_jax.models.sd3.config import MMDiTConfig

        adapters, tokens = LoRAConfig(self.rank, self.rank), (self.size // 16) ** 2
        step = adapter_step_flops(MMDiTConfig(**self.transformer()), adapters, tokens, CLIP + 1, mapped=CLIP).needed
        return self.batch * (step + (0 if cached else vae_encoder_flops(encoder(), self.size, self.size)))

    def inputs(self) -> dict[str, np.ndarray]:
        """Pictures, prompts and masks; channels last."""
        rng = np.random.default_rng(0)
        draw = lambda *shape: rng.standard_normal((self.batch, *shape)).astype(np.float32)
        averaging = np.zeros((self.batch, self.masks, CLIP), np.float32)
        for row in range(self.masks):
            averaging[:, row, 1 + 3 * row : 4 + 3 * row] = 1 / 3
        masks = np.zeros((self.batch, self.masks, self.size, self.size), bool)
        edges = np.linspace(0, self.size, self.masks + 1).astype(int)
        for row in range(self.masks):
            masks[:, row, edges[row] : edges[row + 1]] = True
        context = np.pad(draw(CLIP, 2048), ((0, 0), (0, ZEROS), (0, 2048)))
        image = rng.integers(0, 256, (self.batch, self.size, self.size, 3), np.uint8)
        latents = draw(self.size // 8, self.size // 8, 16)
        return {"image": image, "latents": latents, "context": context, "pooled": draw(2048)} | {
            "masks": masks,
            "averaging": averaging,
        }


def main(case: Case = Case(), variants: tuple[Variant, ...] = VARIANTS, only: Variant | None = None) -> None:
    """Measure.

    Args:
      case: shapes.
      variants: what is compared, one after the other.
      only: measure one in this process, and print its figures as JSON.
    """
    if only is not None:
        print(json.dumps(released(case) if only == "release" else ours(case, cached="cached" in only)))
        return
    console = Console(highlight=False, width=120)
    options = [f"--case.{name}={value}" for name, value in asdict(case).items()]
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        load = os.getloadavg()[0]
        command = [sys.executable, __file__, *options, f"--only={variant}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[variant] = json.loads(done.stdout.splitlines()[-1]) | {"load": load}
    columns = ("", "images/s", "x", "images / CPU s", "x", "of peak", "peak GiB", "begun", "temp.", "load")
    table = Table(*columns, title=str(case))
    base = found.get("release") or next(iter(found.values()))
    for variant, figures in found.items():
        rate, thrift = case.batch / figures["seconds"], case.batch / figures["cpu_seconds"]
        ratios = base["seconds"] / figures["seconds"], base["cpu_seconds"] / figures["cpu_seconds"]
        share = case.needed(cached="cached" in variant) / figures["seconds"] / figures["matmul"]
        row = (f"{rate:.3f}", f"{ratios[0]:.2f}", f"{thrift:.3f}", f"{ratios[1]:.2f}", f"{share:.2f}")
        row += (f"{figures['peak']:.2f}",)
        parts = (f"{figures[part]:.2f}" if part in figures else "" for part in ("begun", "temporaries"))
        table.add_row(variant, *row, *parts, f"{figures['load']:.1f}")
    console.print(table)
    peaks = (f"{variant} {figures['matmul'] / 1e9:.0f}" for variant, figures in found.items())
    console.print(f"peak, GFLOP/s: {', '.join(peaks)}")
    console.print("; ".join(dict.fromkeys(figures["on"] for figures in found.values())))


def timed(step: Callable[[], None], case: Case) -> dict[str, float]:
    """Median wall and CPU seconds of a step."""
    wall, cpu = [], []
    step()
    for _ in range(case.repeats):
        begun, spent = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - spent)
    return {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu)}


def resident() -> float:
    """GiB, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(case: Case, *, cached: bool) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from seg4diff_jax.flow import logit_normal_sigmas
    from seg4diff_jax.magnet.objective import MagnetBatch, MagnetObjective, magnet_loss
    from seg4diff_jax.magnet.task import REMATERIALISED
    from seg4diff_jax.models.attention import ForwardOptions
    from seg4diff_jax.models.conditioning import TextConditioning
    from seg4diff_jax.models.encoders import segments
    from seg4diff_jax.models.lora import LoRA, LoRAConfig, add_lora
    from seg4diff_jax.models.sd3.model import MMDiT, MMDiTConfig
    from seg4diff_jax.models.vae import VAE as Autoencoder
    from seg4diff_jax.parallel import make_mesh
    from seg4diff_jax.passes import NoisedImages, encode_images
    from seg4diff_jax.training.optimizers import OptimizerConfig
    from seg4diff_jax.training.state import take_apart
    from seg4diff_jax.training.step import make_step
    from seg4diff_jax.training.throughput import measured_peak

    matmul = measured_peak(case.dtype)
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(case.dtype), "param_dtype": jnp.dtype(case.dtype)}

    class Both(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            base = MMDiT(MMDiTConfig(**case.transformer()), rngs=rngs, **dtypes)
            self.transformer = add_lora(base, LoRAConfig(case.rank, case.rank), rngs)
            self.vae = None if cached else Autoencoder(encoder(), rngs=rngs, **dtypes)

    def drawn() -> Both:
        """Of noise, an array at a time: to draw all of them in one program takes more memory than a step."""
        rng = np.random.default_rng(0)
        graph, shapes = nnx.split(nnx.eval_shape(lambda: Both(nnx.Rngs(0))))
        draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02), leaf.dtype)
        return nnx.merge(graph, jax.tree.map(draw, shapes))

    objective = MagnetObjective()

    def loss(model: Any, batch: Any, key: Any) -> Any:
        for_noise, for_sigma = jax.random.split(key)
        latents = batch["latents"]
        if model.vae is not None:
            latents = encode_images(model.vae, batch["image"])
        sigma = logit_normal_sigmas(for_sigma, len(latents), mean=0.0, std=0.5, shift=3.0)
        shown = MagnetBatch(
            images=NoisedImages(latents, jax.random.normal(for_noise, latents.shape), sigma),
            texts=TextConditioning.from_full(batch["context"], batch["pooled"], ZEROS, segments(CLIP, ZEROS)),
            masks=batch["masks"],
            real=jnp.ones(batch["masks"].shape[:2], bool),
            averaging=batch["averaging"],
        )
        options = ForwardOptions(remat=REMATERIALISED[case.remat])
        return magnet_loss(model.transformer, shown, objective, block=case.block, options=options)

    mesh = make_mesh(1, 1, 1, among=jax.devices()[:1])
    with jax.set_mesh(mesh):
        structure, trainable, frozen = take_apart(drawn(), LoRA)
        config = OptimizerConfig(RATE, "constant", weight_decay=DECAY, clip=CLIP_NORM)
        step = make_step(loss, structure, trainable, config, mesh, steps=1000, seed=0)
        state, batch = step.initial(trainable), case.inputs()
        compiled = step.take.lower(state, frozen, batch).compile()
        begun, memory = resident(), compiled.memory_analysis()

        def once() -> None:
            nonlocal state
            state, metrics = compiled(state, frozen, batch)
            assert np.isfinite(float(metrics["loss"]))

        figures: dict[str, Any] = timed(once, case)
    figures |= {} if memory is None else {"temporaries": memory.temp_size_in_bytes / 2**30}
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    figures |= {"peak": resident(), "begun": begun} if used is None else {"peak": used / 2**30}
    return figures | {"matmul": matmul, "on": f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {host()}"}


def encoder() -> Any:
    from seg4diff_jax.models.vae import VAEConfig

    shape = {name: value for name, value in VAE.items() if name != "shift"}
    return VAEConfig(**shape, shift_factor=VAE["shift"], scaling_factor=SCALING, use_quant_conv=False)


def host() -> str:
    return f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"


# ---- the release ----------------------------------------------------------------------------------------------------


def released(case: Case) -> dict[str, Any]:
    from benchmarks.released_magnet_step import ReleasedStep

    step = ReleasedStep(case.transformer(), VAE, SCALING, case.inputs(), block=case.block, rank=case.rank)
    figures = timed(step, case)
    return figures | {
        "peak": step.peak() or resident(),
        "matmul": step.matmul_peak(),
        "on": f"{step.versions()}, {host()}",
    }


if __name__ == "__main__":
    auto_cli(main)
