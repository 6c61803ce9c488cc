"""What `seg4diff reproduce` does: says what it needs, measures step by step, and writes the page."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.command_line.memory import explaining_full_memory
from seg4diff_jax.command_line.perturbation import loaded_scorers
from seg4diff_jax.command_line.picture_directory import remove_progress
from seg4diff_jax.command_line.prompt_file import prompts_of
from seg4diff_jax.command_line.segment import load_shown, open_named, resumable_directory
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.families import SD3
from seg4diff_jax.convert.load import open_component
from seg4diff_jax.convert.sources.hub import download_bytes, is_repository_id
from seg4diff_jax.data.subset import Subset
from seg4diff_jax.evaluation.benchmarks import Benchmark, open_benchmark
from seg4diff_jax.evaluation.options import Data
from seg4diff_jax.interrupted_runs import DIRECTORY, asked_before, begin, refuse_changes, write_whole
from seg4diff_jax.miniature.world.shapes import scene
from seg4diff_jax.reproduction.components import labelled_items
from seg4diff_jax.reproduction.cost import SUSTAINED, Amounts, forward_passes, operations
from seg4diff_jax.reproduction.page import reproduction_page
from seg4diff_jax.reproduction.parts import Part, Step
from seg4diff_jax.reproduction.run import STEPS, measured_steps, presented, remove_former
from seg4diff_jax.reproduction.subject import OnProgress, Subject
from seg4diff_jax.terminal import Bar, stderr_console
from seg4diff_jax.text import class_prompts
from seg4diff_jax.training.throughput import measured_peak
from seg4diff_jax.versions import versions

PAGE, RECORD = "reproduction.html", "reproduction.json"
TOLD_OF_PROGRESS = 100
T5_TOKENS = 256
"""Of a prompt, as `text.tokenize` pads it."""


def run(options: Any) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it warns that PyTorch is missing
    console, started = stderr_console(), time.perf_counter()
    for name in ("count", "images", "seeds", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}: expected at least 1")
    if options.count < 2:
        raise ValueError("--count is 1: expected at least 2 prompts: intervals are over prompts")
    out = default_directory(options)
    if tell_download(console, options) and options.plan:
        console.print("what it needs of memory and time is said when the model is there")
        return
    checkpoint = open_named(options)
    checkpoint.block()  # without an expert block there is nothing to reproduce
    benchmark, prompts = labelled(options, checkpoint), asked_prompts(options, checkpoint)
    tell_plan(console, options, checkpoint, benchmark, len(prompts))
    if options.plan:
        return
    asked = {name: value for name, value in options.as_dict().items() if name not in ("resume", "overwrite", "out")}
    asked |= {f"prompt {number}": prompt for number, prompt in enumerate(prompts, 1)}
    former = asked_before(out / DIRECTORY) if options.resume else None
    if former is not None:
        refuse_changes(out / DIRECTORY, former, asked)
    scorers, _ = loaded_scorers(options)
    adapters, options.lora = options.lora and Path(options.lora), None  # the model itself is loaded without them
    pipe, dtype, _ = load_shown(console, checkpoint, options)
    if former is None:
        remove_former(out)
        begin(out / DIRECTORY, asked)
    subject = Subject(
        options.model,
        checkpoint,
        pipe,
        prompts,
        benchmark,
        scorers,
        seeds=tuple(range(options.seeds)),
        batch_size=options.batch,
        adapters=adapters,
    )
    with explaining_full_memory("choose a smaller --batch, or --dtype bfloat16"):
        found = measured_steps(subject, out, shown_on(console))
    parts = presented(subject, found)
    seconds = time.perf_counter() - started
    judges = ", ".join(dict.fromkeys(scorers.models.values())) if scorers else "nothing"
    about = f"{len(prompts)} prompts, {len(benchmark.source)} images of {benchmark.name}; pictures scored by {judges}"
    page = reproduction_page(parts, out, model=options.model, about=about)
    (out / PAGE).write_text(page, encoding="utf-8")
    record = {
        **asked,
        "dtype": dtype,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "seconds": seconds,
    }
    record |= {"findings": [claim._asdict() for part in parts for claim in part.claims], "measured": found}
    write_whole(out / DIRECTORY, out / RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    for step in STEPS:
        (out / DIRECTORY / f"{step.name}.json").unlink(missing_ok=True)
    remove_progress(out)
    tell(parts)
    console.print(f"{seconds:.0f} s; wrote {out}: {PAGE}, {RECORD}")


def default_directory(options: Any) -> Path:
    model = Path(options.model).name
    return resumable_directory(options, f"runs/reproduce/{model}-{datetime.now():%Y%m%d-%H%M%S}", RECORD)


def labelled(options: Any, checkpoint: Checkpoint) -> Benchmark:
    """Opens the labelled images, the first `--images` of them. Raises ValueError if none are named."""
    data = Data(options.data.name, options.data.root, options.data.split, scenes=options.images)
    if options.model != "miniature" and data.name is None and data.root is None:
        raise ValueError("labelled images are needed: --data.name and --data.root, or a folder as --data.root")
    benchmark = open_benchmark(data, checkpoint.trained_size)
    source: Any = benchmark.source
    benchmark = replace(benchmark, source=Subset(source, range(len(source))[: options.images]))
    if not labelled_items(benchmark, checkpoint.tokenizers, 1):
        found = f"none of {len(benchmark.source)} images of {benchmark.where}"
        raise ValueError(f"{found} shows classes that fit in one prompt: expected at least one; give more --images")
    return benchmark


def asked_prompts(options: Any, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Returns the prompts of the pictures. Raises ValueError if there are none."""
    if options.prompts is None:
        if options.model != "miniature":
            raise ValueError("prompts are needed for pictures: --prompts FILE, a prompt a line")
        return tuple(scene("test", index, checkpoint.trained_size).caption for index in range(options.count))
    if len(prompts := prompts_of(options.prompts)[: options.count]) < 2:
        raise ValueError(f"{options.prompts} has one prompt: expected at least 2: intervals are over prompts")
    return tuple(prompts)


def tell_download(console: Console, options: Any) -> bool:
    """Says how large the download of a Hub id is, and returns whether the model is one.

    What keeps the size from being known is said when the model is opened.
    """
    if Path(options.model).expanduser().exists() or not is_repository_id(options.model):
        return False
    components = [name for name in SD3.components if options.t5 or name != SD3.t5]
    variant = "fp16" if options.variant is None else options.variant
    with suppress(CheckpointError):
        size = download_bytes(options.model, components, variant)
        console.print(f"{options.model}: {size / 1e9:,.1f} GB from the Hub, less what an earlier download left")
    return True


def tell_plan(console: Console, options: Any, checkpoint: Checkpoint, benchmark: Benchmark, prompts: int) -> None:
    """Says what the run needs: memory of the weights, passes, and time by this machine's rate of matrix products."""
    config, side = checkpoint.transformer, checkpoint.trained_size
    trains = options.model == "miniature" and options.lora is None
    vocabulary = len(class_prompts(checkpoint.tokenizers, benchmark.prompts).prompts)
    images, levels = len(benchmark.source), len({*Subject.levels, checkpoint.step()})
    amounts = Amounts(prompts, images, levels, options.seeds, vocabulary, trains or options.lora is not None, trains)
    passes = forward_passes(config.num_layers, amounts)
    text = checkpoint.clip_tokens + (T5_TOKENS if checkpoint.t5 else checkpoint.clip_tokens)
    total = operations(sum(passes.values()), 4 * images, config, checkpoint.vae, side, text)
    dtype = jnp.dtype(options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    minutes = total / (SUSTAINED * measured_peak(str(dtype))) / 60
    weights = sum(open_component(checkpoint.source, name, dtype=dtype).nbytes for name in checkpoint.configs)
    models = 1 + amounts.with_adapters
    each = "" if models == 1 else ", twice for MAGNET before and after"
    console.print(f"{weights / 1e9:,.2f} GB of weights in {dtype}{each}, beside what a batch of {options.batch} takes")
    each = ", ".join(f"{name} {count:,}" for name, count in passes.items())
    console.print(f"{sum(passes.values()):,} forward passes at {side} x {side} pixels: {each}")
    console.print(
        f"{total / 1e12:,.1f} TFLOP: about {minutes:,.0f} minutes at {100 * SUSTAINED:.0f} % of this machine's matrix "
        f"products in {dtype}, and compiling"
    )


@contextmanager
def _shown(console: Console, step: Step) -> Iterator[OnProgress]:
    start = time.perf_counter()
    with Bar(console, step.doing, TOLD_OF_PROGRESS, elapsed=True) as bar:
        yield lambda part: bar.update(round(TOLD_OF_PROGRESS * part))
    console.print(f"{step.doing}: {time.perf_counter() - start:.0f} s")


def shown_on(console: Console) -> Any:
    return lambda step: _shown(console, step)


def tell(parts: list[Part]) -> None:
    for part in parts:
        for claim in part.claims:
            print(f"{claim.verdict}: {claim.paper} ({claim.where}) {claim.found}")
