"""`evaluate.py`: a model on a benchmark, from options to results and a page of pictures."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from seg4diff_jax.evaluation.options import BATCH_TOKENS, STEPS, Options, chosen_blocks, numbers, parse

if TYPE_CHECKING:
    from seg4diff_jax.evaluation.benchmarks import Benchmark
    from seg4diff_jax.evaluation.run import Evaluation, Settings
    from seg4diff_jax.pipeline import Pipeline

RESULTS, CONFIG = "results.json", "config.yaml"
AT_FAULT = (ValueError, OSError, MemoryError, FloatingPointError)
"""Errors whose messages are for the user; those of checkpoints, folders and images are ValueErrors."""
SCORES = {"miou": "mIoU", "pixel_accuracy": "pixel acc.", "things": "things", "stuffs": "stuffs"}
LINE_EVERY = 30
"""Seconds between lines of progress where there is no terminal."""
MOST_NAMED = 5
"""Left-out images that are named on the terminal; `results.json` has all."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate what the arguments say. Returns the exit status: 1, after one message on stderr, when input is wrong."""
    options = parse(list(sys.argv[1:] if arguments is None else arguments))
    try:
        run(options)
    except AT_FAULT as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run(options: Options) -> None:
    started = time.perf_counter()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it warns that it has no PyTorch; none is needed
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with console.status("starting"):  # importing JAX takes seconds
        from seg4diff_jax.command_line.memory import TO_LOAD, full_memory_told
        from seg4diff_jax.command_line.segment import output_directory
        from seg4diff_jax.evaluation.expert import name_expert
        from seg4diff_jax.evaluation.run import evaluate
    out = output_directory(options.out or f"runs/evaluate/{datetime.now():%Y%m%d-%H%M%S}", "", options.overwrite)
    with console.status(f"loading {options.model}"), full_memory_told(TO_LOAD):
        pipe, benchmark, settings = prepare(options)
    loading = time.perf_counter() - started
    images, passes = len(benchmark.source), len(settings.steps) * len(settings.seeds)
    console.print(
        f"{options.model} on {images} images of {benchmark.where}: {counted(len(settings.blocks), 'block')}, "
        f"{counted(len(settings.steps), 'noise level')}, {counted(len(settings.seeds), 'seed')}"
    )
    remedy = "give a smaller --batch-size, or --dtype bfloat16"
    with progress(console, images, passes) as advance, full_memory_told(remedy):
        evaluation = evaluate(pipe, benchmark, settings, shown=options.pictures, progress=advance)
    known: dict[str, Any] = {name: list(getattr(settings, name)) for name in ("blocks", "steps", "seeds")}
    known |= {"batch_size": settings.batch_size, "dtype": pipe.transformer.pos_embed.get_value().dtype.name}
    chosen = {"split": benchmark.split, "labels": benchmark.kind}
    if benchmark.background is not None:
        chosen["background"] = benchmark.rule
    data = replace(options.data, **{name: value for name, value in chosen.items() if value})
    resolved = replace(options, data=data, out=str(out), **known)
    seconds = {"loading": loading, **evaluation.seconds}
    with console.status("drawing"):
        write(out, evaluation, benchmark, asdict(resolved), seconds)
    tell(console, evaluation)
    if options.name_expert:
        name_expert(options.model, *evaluation.best)
        console.print(
            f"{options.model}: block {evaluation.best[0]} and noise level {evaluation.best[1]} are its own now"
        )
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    console.print(f"{time.perf_counter() - started:.1f} s: {parts}; results and pictures: {out / 'index.html'}")


def prepare(options: Options) -> tuple[Pipeline, Benchmark, Settings]:
    """The model, the images and what is measured. Options are looked at before gigabytes are read.

    Raises ValueError when one is not usable; the message says why.
    """
    from convert.components import parse_config
    from seg4diff_jax.evaluation.benchmarks import open_benchmark
    from seg4diff_jax.evaluation.expert import configuration
    from seg4diff_jax.evaluation.run import Settings
    from seg4diff_jax.loading import load, open_for_masks

    for name, value, least in (
        ("batch-size", 1 if options.batch_size is None else options.batch_size, 1),
        ("pictures", options.pictures, 0),
    ):
        if value < least:
            raise ValueError(f"--{name} is {value}: expected at least {least}")
    source, _ = open_for_masks(options.model)
    if options.name_expert:
        configuration(options.model)
    transformer, vae = (parse_config(name, source.configs[name]) for name in ("transformer", "vae"))
    tokens = (source.trained_size // (vae.downsampling * transformer.patch_size)) ** 2
    best = source.expert_step if options.steps == "expert" else options.steps
    settings = Settings(
        blocks=chosen_blocks(options.blocks, transformer.num_layers, source.expert_block, options.model),
        steps=numbers(best, "--steps", STEPS),
        seeds=numbers(options.seeds, "--seeds", range(2**31), all_allowed=False),
        batch_size=options.batch_size or max(1, BATCH_TOKENS // tokens),
        skip_unreadable=options.skip_unreadable,
    )
    benchmark = open_benchmark(options.data, source.trained_size)
    pipe = load(options.model, dtype=options.dtype, blocks=max(settings.blocks) + 1)
    return pipe, benchmark, settings


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


@contextmanager
def progress(console: Console, images: int, passes: int) -> Iterator[Callable[[int], None]]:
    """A bar of images, or now and then a line; and how many pass through the transformer in a second."""
    columns = (
        TextColumn("[bold]evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    start = told = time.perf_counter()
    first = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        bar = shown.add_task("", total=images, rate="compiling")

        def advance(done: int) -> None:
            nonlocal start, first, told
            now = time.perf_counter()
            rate = f"{passes * (done - first) / (now - start):.1f} images/s" if first else "compiling"
            if not first:  # compiling is what the first batch waits for
                start, first = now, done
            shown.update(bar, completed=done, rate=rate)
            if shown.disable and now - told > LINE_EVERY:
                told = now
                console.print(f"{done} of {images} images, {rate}")

        yield advance


def write(
    out: Path, evaluation: Evaluation, benchmark: Benchmark, config: dict[str, Any], seconds: Mapping[str, float]
) -> None:
    """Write config.yaml, the page, and results.json: `rows` and `baselines`, in percent, and how they were made.

    The last is written last: a directory that has it is complete.
    """
    from seg4diff_jax.command_line.segment import versions
    from seg4diff_jax.reporting.evaluation_page import write_page

    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).unlink(missing_ok=True)
    (out / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    write_page(out, evaluation, benchmark, config)
    contents = {
        "rows": evaluation.rows,
        "baselines": evaluation.baselines,
        "best": dict(zip(("block", "step"), evaluation.best, strict=True)),
        "units": "percent",
        "skipped": evaluation.skipped,
        "unlabelled": evaluation.unlabelled,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "config": config,
        "versions": versions(),
    }
    (out / RESULTS).write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def tell(console: Console, evaluation: Evaluation) -> None:
    """The table of scores on stdout, and on stderr what was left out."""
    from seg4diff_jax.evaluation.scores import averaged, by_setting, guesses
    from seg4diff_jax.reporting.evaluation_page import number

    rows = evaluation.rows
    shown = [name for name in SCORES if any(row[name] is not None for row in rows)]
    images, seeds = rows[0]["images"], len({row["seed"] for row in rows})
    over = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    table = Table(title=f"{rows[0]['dataset']}, {images} images, %{over}", title_justify="left", title_style="bold")
    table.add_column("")
    for name in shown:
        table.add_column(SCORES[name], justify="right")
    cells = lambda some: [number(averaged(some, shown)[name]) for name in shown]
    for (block, step), some in by_setting(rows).items():
        best = "bold" if (block, step) == evaluation.best else ""
        table.add_row(f"block {block}, noise level {step}", *cells(some), style=best)
    table.add_section()
    names = {"random": "random (chance)", "constant": "one class everywhere", "permuted": "positions permuted"}
    for name, some in guesses(evaluation.baselines, evaluation.best).items():
        table.add_row(names[name], *cells(some), style="dim")
    Console(highlight=False).print(table)
    for names, what in ((evaluation.skipped, "skipped"), (evaluation.unlabelled, "without a labelled pixel")):
        if names:
            listing = "".join(f"\n  {name}" for name in names[:MOST_NAMED])
            console.print(f"{counted(len(names), 'image')} {what}:{listing}" + "\n  ..." * (len(names) > MOST_NAMED))
