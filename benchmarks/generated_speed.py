"""Measures pictures per second beside diffusers' StableDiffusion3Pipeline: same weights, noise, steps, guidance; fp32.

    PYTHONPATH=. python benchmarks/generated_speed.py
    PYTHONPATH=. python benchmarks/generated_speed.py --cases '["random blocks"]' --size 512 --layers 24 --repeats 3

The cases: the miniature, one picture and a batch, from prompt to pixels (28 steps, guidance 7, a new prompt each time);
and random blocks of SD3-medium's width, from 154 text tokens to latents, without text encoders and autoencoder. The
tokens are all different, or 77 of them are the zeros that stand in T5's place where it is not loaded. Each side runs in
a process of its own, on the same number of threads. Runs alternate, and so does which side comes first: other load on
the machine affects both, and the processor's own seconds stand beside the clock's. The first run compiles; it is not
counted, but has a column. Memory is a process' peak from its first run on.

diffusers runs as its users run it, in `torch.inference_mode`. Measure on a machine that does nothing else: PyTorch's
threads spin for a while when they wait, and beside other programs that makes them several times slower. With
OMP_WAIT_POLICY=PASSIVE they sleep. The largest difference of the results shows that both have done the same work: our
pixels are rounded, by up to half a level. The last column is what each side's library reaches in the largest linear
layer alone, by the clock.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse import auto_cli
from real_shapes.job import forget_peak_memory, peak_resident
from rich.console import Console
from rich.table import Table

Side = Literal["diffusers", "ours"]
Name = Literal["miniature", "miniature, batch", "random blocks", "random blocks, no T5"]
SIDES: tuple[Side, ...] = ("diffusers", "ours")
CASES: tuple[Name, ...] = ("miniature", "miniature, batch", "random blocks", "random blocks, no T5")
TEXT_TOKENS, ZEROS, GUIDANCE = 154, 77, 7.0


@dataclass(frozen=True)
class Case:
    """What is measured. Random blocks have a directory with their weights."""

    name: Name
    pictures: int
    size: int
    steps: int
    threads: int
    directory: str

    @property
    def is_random(self) -> bool:
        return self.name.startswith("random blocks")

    @property
    def zeros(self) -> int:
        """How many of the last text tokens are zeros, in the place of T5's."""
        return ZEROS if self.name.endswith("no T5") else 0

    def noise(self, factor: int) -> np.ndarray:
        side = self.size // factor
        return np.random.default_rng(0).standard_normal((self.pictures, side, side, 16), np.float32)

    def texts(self, joint_dim: int, pooled_dim: int) -> list[np.ndarray]:
        """Context and pooled states of the prompts, then of the negative prompts."""
        rng, count = np.random.default_rng(1), self.pictures
        draw = lambda *shape: rng.standard_normal((count, *shape), np.float32)
        states = [draw(*shape) for _ in range(2) for shape in ((TEXT_TOKENS, joint_dim), (pooled_dim,))]
        for context in states[::2]:
            context[:, TEXT_TOKENS - self.zeros :] = 0
        return states

    def prompts(self, number: int) -> list[str]:
        return [f"a star on grass {number} {picture}" for picture in range(self.pictures)]


class Generator:
    """One side of a case: `run` makes pictures or latents, channels last; `rate` multiplies matrices."""

    def __init__(self, run: Callable[[int], np.ndarray], rate: Callable[[tuple[int, int, int]], Callable[[], Any]]):
        self.run, self.rate = run, rate


def main(
    cases: tuple[Name, ...] = CASES,
    batch: int = 8,
    layers: int = 4,
    size: int = 256,
    steps: int = 4,
    heads: int = 24,
    miniature_steps: int = 28,
    repeats: int = 9,
    batch_repeats: int = 5,
    threads: int = os.cpu_count() or 1,
    only: Side | None = None,
    case: Case | None = None,
) -> None:
    """Measure.

    Args:
      cases: of which kind.
      batch: pictures of the miniature's batch.
      layers, size, steps, heads: of the random blocks. SD3-medium has 24 heads of 64.
      miniature_steps: of the miniature.
      repeats: runs of each side; batch_repeats: of the miniature's batch, which takes longer.
      threads: of PyTorch. XLA takes all cores.
      only, case: the parent process sets them: answer its requests for one side of one case.
    """
    if only is not None and case is not None:
        answer({"diffusers": theirs, "ours": ours}[only](case), Path(case.directory), only)
        return
    console = Console(highlight=False, width=140)
    columns = ("", "", "pictures/s", "at best", "CPU s/picture", "at best", "peak GiB", "first, s", "GFLOP/s")
    table = Table(title=f"fp32, guidance {GUIDANCE:g}; medians, and the best run")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right" if column else "left")
    notes, found, begun = [], {}, os.getloadavg()[0]
    for name in cases:
        with tempfile.TemporaryDirectory(prefix="generated-speed-") as directory:
            shape = (1, size, steps) if name.startswith("random") else (1, 64, miniature_steps)
            pictures = batch if name == "miniature, batch" else shape[0]
            each = Case(name, pictures, *shape[1:], threads, directory)
            product = (2 * pictures * 256, 128, 512)
            if each.is_random:
                write_random_blocks(Path(directory) / "transformer", layers, heads)
                product = (2 * (size // 16) ** 2, 64 * heads, 256 * heads)
            found = measured(each, batch_repeats if name == "miniature, batch" else repeats, product)
        title = f"{layers} {name}" if each.is_random else name.replace("batch", f"batch of {batch}")
        add_rows(table, f"{title}, {each.size} px, {each.steps} steps", pictures, found)
        notes.append(f"{title}: {found['differ']}")
    console.print(table)
    console.print("largest difference: " + "; ".join(notes))
    on = "; ".join(found[side]["versions"] for side in SIDES)
    loads = "–".join(f"{load:.1f}" for load in (begun, os.getloadavg()[0]))
    console.print(f"{on}; {os.cpu_count()} cores, load {loads}")


def write_random_blocks(directory: Path, layers: int, heads: int) -> None:
    """Writes a transformer of SD3-medium's, or a smaller, width in diffusers' format, in a process of its own."""
    sizes = {"num_layers": layers, "num_attention_heads": heads, "caption_projection_dim": 64 * heads}
    published = {"sample_size": 128, "pos_embed_max_size": 192}
    published |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048}
    script = (
        "import json, sys; from diffusers import SD3Transformer2DModel as T\n"
        "from tests.reference.random_weights import SD3_QUERIES, randomize_, temper_\n"
        "model = randomize_(T(**json.loads(sys.argv[1]))); temper_(model, SD3_QUERIES, 5)\n"
        "model.save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, json.dumps(sizes | published), str(directory)], check=True)


# ---- two processes that take turns ----------------------------------------------------------------------------------


def measured(case: Case, repeats: int, product: tuple[int, int, int]) -> dict[str, Any]:
    """Runs both sides in turn. Returns each side's figures, and what their results differ by."""
    options = [f"--case.{name}={value}" for name, value in asdict(case).items()]
    sides: dict[str, subprocess.Popen[str]] = {
        side: subprocess.Popen(
            [sys.executable, __file__, *options, f"--only={side}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in SIDES
    }
    try:
        first = {side: ask(sides[side], run=0) for side in SIDES}
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number in range(1, repeats + 1):
            for side in SIDES if number % 2 else SIDES[::-1]:
                runs[side].append(ask(sides[side], run=number))
        peaks = {side: ask(sides[side], peak=True)["peak"] for side in SIDES}
        rates = {side: max(ask(sides[side], product=product)["rate"] for _ in range(3)) for side in (*SIDES, *SIDES)}
        versions = {side: ask(sides[side], versions=True)["versions"] for side in SIDES}
    finally:
        for process in sides.values():
            process.communicate()  # closes the pipe: the process ends
    pairs = [[np.load(Path(case.directory) / f"{side}_{n}.npy") for side in SIDES] for n in range(repeats + 1)]
    worst = max(float(np.abs(theirs - ours).max()) for theirs, ours in pairs)
    largest = max(float(np.abs(theirs).max()) for theirs, _ in pairs)
    differ = f"{worst / largest:.1e} of the largest latent" if case.is_random else f"{worst:.4f} of 255 levels"
    return {"differ": differ} | {
        side: {"first": first[side]["seconds"], "peak": peaks[side], "rate": rates[side], "versions": versions[side]}
        | {kind: [run[kind] for run in runs[side]] for kind in ("seconds", "cpu_seconds")}
        for side in SIDES
    }


def ask(process: subprocess.Popen[str], **request: Any) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("{"):
        if not line:
            raise RuntimeError(f"a side ended with {process.wait()}; it has said why")
    return json.loads(line)


def answer(generator: Generator, directory: Path, side: Side) -> None:
    """Does what the parent process asks for, until it closes the pipe."""
    forget_peak_memory()
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            begun, spent = time.perf_counter(), time.process_time()
            made = generator.run(request["run"])
            reply = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - spent}
            np.save(directory / f"{side}_{request['run']}.npy", made)
        elif "product" in request:
            rows, inner, columns = request["product"]
            multiply, times = generator.rate((rows, inner, columns)), []
            for _ in range(20):
                begun = time.perf_counter()
                multiply()
                times.append(time.perf_counter() - begun)
            reply = {"rate": 2 * rows * inner * columns / min(times) / 1e9}
        else:
            reply = {"peak": peak_resident() / 2**30} if "peak" in request else {"versions": versions(side)}
        print(json.dumps(reply), flush=True)


def versions(side: Side) -> str:
    if side == "ours":
        import jax

        return f"jax {jax.__version__}"
    import diffusers
    import torch

    return f"torch {torch.__version__} on {torch.get_num_threads()} threads, diffusers {diffusers.__version__}"


def add_rows(table: Table, title: str, pictures: int, found: dict[str, Any]) -> None:
    base = found["diffusers"]
    for side in SIDES:
        figures, cells = found[side], []
        seconds, least = statistics.median(figures["seconds"]), min(figures["seconds"])
        cells += [f"{pictures / seconds:.3g}", f"{pictures / least:.3g}"]
        spent, fewest = statistics.median(figures["cpu_seconds"]), min(figures["cpu_seconds"])
        cells += [f"{spent / pictures:.3g}", f"{fewest / pictures:.3g}"]
        rest = (f"{figures['peak']:.2f}", f"{figures['first']:.1f}", f"{figures['rate']:.0f}")
        table.add_row(title, side, *cells, *rest)
    ours = found["ours"]
    ratios = [
        f"{summary(base[kind]) / summary(ours[kind]):.2f} x"
        for kind in ("seconds", "cpu_seconds")
        for summary in (statistics.median, min)
    ]
    table.add_row(
        "", "ratio", *ratios, f"{base['peak'] / ours['peak']:.2f} x", "", f"{ours['rate'] / base['rate']:.2f} x"
    )


# ---- diffusers ------------------------------------------------------------------------------------------------------


def theirs(case: Case) -> Generator:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    from seg4diff_jax.convert.sources.open import MINIATURE

    torch.set_num_threads(case.threads)
    nothing: dict[str, Any] = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    shared: dict[str, Any] = {"num_inference_steps": case.steps, "guidance_scale": GUIDANCE}
    shared |= {"height": case.size, "width": case.size}
    noise = lambda factor: torch.from_numpy(case.noise(factor).transpose(0, 3, 1, 2).copy())
    pipeline: Any
    if case.is_random:
        transformer = SD3Transformer2DModel.from_pretrained(Path(case.directory) / "transformer").eval()
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
        nothing |= dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        pipeline = StableDiffusion3Pipeline(transformer, scheduler, **nothing)
        config: Any = transformer.config
        names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
        states = case.texts(config.joint_attention_dim, config.pooled_projection_dim)
        shared |= dict(zip(names, map(torch.from_numpy, states), strict=True))
    else:
        pipeline = StableDiffusion3Pipeline.from_pretrained(MINIATURE, dtype=torch.float32, **nothing)
        shared["max_sequence_length"] = 77
    pipeline.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def run(number: int) -> np.ndarray:
        if case.is_random:
            made = pipeline(latents=noise(8), output_type="latent", **shared).images
            return made.permute(0, 2, 3, 1).numpy()
        return 255 * pipeline(case.prompts(number), latents=noise(4), output_type="np", **shared).images

    def rate(product: tuple[int, int, int]) -> Callable[[], Any]:
        rows, inner, columns = product
        x, layer = torch.randn(rows, inner), torch.nn.Linear(inner, columns)
        return lambda: torch.inference_mode()(layer)(x)

    return Generator(run, rate)


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(case: Case) -> Generator:
    import jax
    import jax.numpy as jnp

    import seg4diff_jax as s4d
    from seg4diff_jax.convert.load import load_component
    from seg4diff_jax.flow import FlowSchedule
    from seg4diff_jax.models.conditioning import TextConditioning
    from seg4diff_jax.models.encoders import segments
    from seg4diff_jax.numerics import computing
    from seg4diff_jax.sampling import GeneratingRun, sample_latents

    if case.is_random:
        model = load_component(Path(case.directory) / "transformer", "transformer", dtype=jnp.float32)
        config = model.config
        states, parts = case.texts(config.joint_attention_dim, config.pooled_projection_dim), segments(77, ZEROS)
        states = map(jnp.asarray, states)
        text = lambda: TextConditioning.from_full(next(states), next(states), max(1, case.zeros), parts)
        prompts, negatives = text(), text()
        sigmas = jnp.asarray(FlowSchedule().sigmas(case.steps), jnp.float32)

        def run(number: int) -> np.ndarray:
            asked = GeneratingRun(jnp.asarray(case.noise(8)), prompts, sigmas, (negatives, jnp.float32(GUIDANCE)))
            with computing(jnp.float32, None):
                return np.asarray(sample_latents(model, asked))
    else:
        pipe = s4d.load("miniature", dtype="float32")

        def run(number: int) -> np.ndarray:
            options: Any = {"noise": case.noise(4), "steps": case.steps, "guidance": GUIDANCE}
            return np.stack(pipe.generate(case.prompts(number), **options)).astype(np.float32)

    def rate(product: tuple[int, int, int]) -> Callable[[], Any]:
        rows, inner, columns = product
        x, kernel = (jax.random.normal(jax.random.key(0), shape) for shape in ((rows, inner), (inner, columns)))
        layer = jax.jit(lambda x, kernel, bias: x @ kernel + bias)
        return lambda: layer(x, kernel, jnp.zeros(columns)).block_until_ready()

    return Generator(run, rate)


if __name__ == "__main__":
    auto_cli(main)
