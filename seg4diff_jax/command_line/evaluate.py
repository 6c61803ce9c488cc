"""`evaluate.py`: scores a model on a benchmark, and writes results and a page of pictures."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from seg4diff_jax.command_line import AT_FAULT
from seg4diff_jax.configuration import Refusals, problems, refuse
from seg4diff_jax.convert.command_line import exit_status
from seg4diff_jax.evaluation.options import (
    AVERAGE_PRECISION,
    BATCH_TOKENS,
    GROUPS,
    MEAN,
    OPEN_VOCABULARY,
    PRESENCE,
    STEPS,
    UNSUPERVISED,
    WITH_ABSENT,
    WITH_DECOYS,
    Decoys,
    Options,
    background_thresholds,
    chosen_heads,
    kinds_of_prompts,
    metrics,
    numbers,
    parse,
    protocols,
    thresholds,
)
from seg4diff_jax.numerics import settled
from seg4diff_jax.quoting import counted
from seg4diff_jax.terminal import counted_pieces, stderr_console

if TYPE_CHECKING:
    from seg4diff_jax.checkpoints import Checkpoint
    from seg4diff_jax.evaluation.benchmarks import Benchmark
    from seg4diff_jax.evaluation.measurement import OnImages, Settings
    from seg4diff_jax.pipeline import Pipeline
    from seg4diff_jax.segmentation.unsupervised_scores import UnsupervisedProtocol


@settled()
def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates as the arguments say. Returns the exit status: 1, after one message on stderr, for wrong input."""
    return exit_status(lambda: run(parse(list(sys.argv[1:] if arguments is None else arguments))), AT_FAULT)


def run(options: Options) -> None:
    """Runs the evaluation. All processes measure; the first one writes the results."""
    started = time.perf_counter()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it warns that PyTorch is missing
    console = stderr_console()
    with console.status("starting"):  # importing JAX takes seconds
        import jax

        from seg4diff_jax.command_line.memory import TO_LOAD, explaining_full_memory
        from seg4diff_jax.evaluation.expert import name_expert
        from seg4diff_jax.evaluation.report.page import PAGE
        from seg4diff_jax.evaluation.results import tell, write
        from seg4diff_jax.evaluation.resumption import Progress
        from seg4diff_jax.evaluation.rows import best_setting
        from seg4diff_jax.evaluation.run import evaluate
        from seg4diff_jax.parallel import named_devices
        from seg4diff_jax.processes import in_step, join_processes

        if options.distributed:
            join_processes()
    first = jax.process_index() == 0
    console.quiet = not first
    out = in_step(lambda: results_directory(options) if first else Path())
    with console.status(f"loading {options.model}"), explaining_full_memory(TO_LOAD):
        pipe, benchmark, chosen = prepare(options)
    settings = chosen.settings
    loading = time.perf_counter() - started
    images, kinds = len(benchmark.source), len(settings.prompts) + bool(settings.unsupervised)
    passes = len(settings.steps) * len(settings.seeds) * kinds
    adapters = f" with adapters of {options.lora}" if options.lora else ""
    counts = {"block": settings.blocks, "noise level": settings.steps, "seed": settings.seeds}
    described = ", ".join(counted(len(some), what) for what, some in counts.items())
    where = f"{images} images of {benchmark.where}"
    resolved = resolve(options, pipe, benchmark, chosen, out)
    console.print(f"{options.model}{adapters} on {where}: {described}{heads_described(settings.heads)}")
    console.print(f"{resolved['dtype']} on {named_devices()}")
    kept = Progress(out, {"images": images, **measured(resolved)}) if first else None
    if kept and not options.resume:
        kept.clear()
    remedy = "give a smaller --batch-size, or --dtype bfloat16"
    with progress(console, images, passes) as advance, explaining_full_memory(remedy):
        evaluation = evaluate(pipe, benchmark, settings, shown=options.pictures, on_progress=advance, kept=kept)
    if not first:
        return
    seconds = {"loading": loading, **evaluation.seconds}
    with console.status("drawing"):
        write(out, evaluation, benchmark, resolved, seconds)
    if kept:
        kept.clear()
    tell(console, evaluation)
    if options.name_expert:
        best = best_setting([row for row in evaluation.rows if row.head is None])
        name_expert(options.model, best.block, best.step)
        console.print(f"{options.model}: block {best.block} and noise level {best.step} are its own now")
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    console.print(f"{time.perf_counter() - started:.1f} s: {parts}; results and a page of them: {out / PAGE}")


def results_directory(options: Options) -> Path:
    """Returns the directory for the results. Raises ValueError if it holds other files or cannot be written."""
    from seg4diff_jax.command_line.segment import resumable_directory
    from seg4diff_jax.evaluation.results import RESULTS

    return resumable_directory(options, f"runs/evaluate/{datetime.now():%Y%m%d-%H%M%S}", RESULTS)


def resolve(options: Options, pipe: Pipeline, benchmark: Benchmark, chosen: Chosen, out: Path) -> dict[str, Any]:
    """Returns the options as plain values, with defaults resolved. Options of how a run was started are left out."""
    settings = chosen.settings
    known: dict[str, Any] = {name: list(getattr(settings, name)) for name in ("blocks", "steps", "seeds")}
    known["heads"] = [MEAN if head is None else head for head in settings.heads]
    known |= {"protocol": list(chosen.protocols), "prompts": list(chosen.prompts), "metrics": list(settings.metrics)}
    if settings.unsupervised:
        merged_below = [protocol.threshold for protocol in settings.unsupervised]
        known["unsupervised"] = replace(options.unsupervised, threshold=merged_below)
    if settings.thresholds:
        below = MEAN if settings.thresholds == (MEAN,) else list(settings.thresholds)
        known["background"] = replace(options.background, threshold=below)
    known |= {"batch_size": settings.batch_size, "dtype": pipe.transformer.pos_embed.get_value().dtype.name}
    found: dict[str, Any] = {"split": benchmark.split, "labels": benchmark.kind, "unlabelled": benchmark.unlabelled}
    if benchmark.background is not None:
        found["background"] = benchmark.rule
    data = replace(options.data, **{name: value for name, value in found.items() if value})
    resolved = json.loads(json.dumps(asdict(replace(options, data=data, out=str(out), **known))))  # tuples are lists
    return {name: value for name, value in resolved.items() if name not in ("resume", "distributed")}


def measured(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the resolved options that affect the scores, as a flat dictionary."""
    names = ("model", "lora", "protocol", "blocks", "heads", "steps", "seeds", "prompts", "metrics", "class_prior")
    grouped = {f"{group}.{name}": each for group in GROUPS for name, each in resolved[group].items()}
    return {name: resolved[name] for name in (*names, "batch_size", "dtype")} | grouped


def prepare(options: Options) -> tuple[Pipeline, Benchmark, Chosen]:
    """Returns the model, the images and the options in their final types. Options are checked before weights are read.

    Raises:
      ValueError: an option cannot be used; the message says why.
    """
    from seg4diff_jax.checkpoints import open
    from seg4diff_jax.evaluation.benchmarks import open_benchmark
    from seg4diff_jax.processes import in_step, in_turn, local_mesh

    mesh = local_mesh()
    checkpoint = in_step(lambda: open(options.model))
    chosen = in_step(lambda: settle(options, checkpoint, mesh.size if mesh else 1))
    settings, side = chosen.settings, checkpoint.trained_size
    opened = lambda: open_benchmark(options.data, side, chosen.protocols, options.background)
    benchmark = in_turn(opened)  # one process writes scenes
    if options.batch_size is None:  # batches are padded to their size, so a small set gets a small batch
        devices = mesh.size if mesh else 1
        most = devices * math.ceil(len(benchmark.source) / devices)
        settings = replace(settings, batch_size=min(settings.batch_size, most))
    blocks = settings.last_block + 1
    pipe = in_step(lambda: checkpoint.load(dtype=options.dtype, mesh=mesh, blocks=blocks, lora=options.lora))
    return pipe, benchmark, chosen._replace(settings=settings)


class Chosen(NamedTuple):
    """Options in their final types.

    Attributes:
      protocols, prompts: as they were asked for, in that order.
      settings: what is measured. It has no prompts where the open-vocabulary protocol is not among `protocols`.
    """

    protocols: tuple[str, ...]
    prompts: tuple[str, ...]
    settings: Settings


def settle(options: Options, checkpoint: Checkpoint, devices: int) -> Chosen:
    """Parses the options once. Raises ValueError with all that do not fit the checkpoint or each other."""
    from seg4diff_jax.class_priors import read_class_prior
    from seg4diff_jax.evaluation.benchmarks import misfits
    from seg4diff_jax.evaluation.expert import configuration
    from seg4diff_jax.evaluation.measurement import Settings, check_batch_size

    refusals = Refusals(misfits(options.data, options.background))
    refusals.found += [
        f"--{name} is {value}: expected at least {least}"
        for name, value, least in (
            ("batch-size", 1 if options.batch_size is None else options.batch_size, 1),
            ("pictures", options.pictures, 0),
            ("shard-batches", options.shard_batches, 1),
            ("decoys.count", options.decoys.count, 1),
            ("decoys.seed", options.decoys.seed, 0),
        )
        if value < least
    ]
    if options.batch_size and options.batch_size > 0:
        refusals.check(lambda: check_batch_size(options.batch_size or 1, devices))
    block = lambda: checkpoint.block() if options.blocks == "expert" else options.blocks
    step = lambda: checkpoint.step() if options.steps == "expert" else options.steps
    model = checkpoint.transformer
    heads = refusals.parsed(lambda: chosen_heads(options.heads, model.num_attention_heads), ())
    blocks = refusals.parsed(lambda: numbers(block(), "--blocks", range(model.num_layers)), ())
    steps = refusals.parsed(lambda: numbers(step(), "--steps", STEPS), ())
    seeds = refusals.parsed(lambda: numbers(options.seeds, "--seeds", range(2**31), all_allowed=False), ())
    prompts = refusals.parsed(lambda: kinds_of_prompts(options.prompts), ())
    chosen = refusals.parsed(lambda: protocols(options.protocol), ())
    further = refusals.parsed(lambda: metrics(options.metrics), ())
    if prompts and chosen:
        refusals.found += unasked(options, prompts if OPEN_VOCABULARY in chosen else (), further)
    merged = ()
    if UNSUPERVISED in chosen:
        merged = refusals.parsed(lambda: merging_protocols(options, chosen), merged)
    for protocol in {OPEN_VOCABULARY, UNSUPERVISED}.difference(chosen) if chosen else ():
        refusals.found += unused(options, protocol)
    refusals.found += problems(options.masks, "--masks.")
    named = options.class_prior
    prior = None if named is None else refusals.parsed(lambda: read_class_prior(named), None)
    if not refusals.found:
        refusals.check(lambda: options.masks.check_fits(max(blocks), model.num_layers, model.num_attention_heads))
        for each in blocks:
            refusals.check(lambda each=each: options.masks.check_prior(prior, each))
        if prior and heads != (None,):
            refusals.found.append(f"--class-prior is of the mean of a block's heads, and --heads is {options.heads!r}")
    if options.name_expert:
        refusals.check(lambda: configuration(options.model))
        if heads and None not in heads:
            refusals.found.append(f"--name-expert names a block by the mean of its heads: add {MEAN} to --heads")
    refuse(refusals.found)

    tokens = (checkpoint.trained_size // checkpoint.view.multiple) ** 2
    settings = Settings(
        heads=heads,
        blocks=blocks,
        steps=steps,
        seeds=seeds,
        batch_size=options.batch_size or devices * max(1, BATCH_TOKENS // tokens),
        prompts=prompts if OPEN_VOCABULARY in chosen else (),
        thresholds=background_thresholds(options.background.threshold) if OPEN_VOCABULARY in chosen else (),
        decoys=options.decoys,
        metrics=further,
        unsupervised=merged,
        resize=options.data.resize,
        lora=options.lora,
        skip_unreadable=options.skip_unreadable,
        shard_batches=options.shard_batches,
        masks=options.masks,
        prior=prior,
    )
    return Chosen(chosen, prompts, settings)


def merging_protocols(options: Options, chosen: Sequence[str]) -> tuple[UnsupervisedProtocol, ...]:
    """How segments without names are made: one way for each threshold, none where `chosen` protocols make none.

    Raises ValueError for options that are not usable, or would go unused.
    """
    from seg4diff_jax.segmentation.grouping import check_threshold
    from seg4diff_jax.segmentation.unsupervised_scores import UnsupervisedProtocol

    if UNSUPERVISED not in chosen:
        refuse(unused(options, UNSUPERVISED))
        return ()
    given = options.unsupervised
    threshold = check_threshold(None, given.minmax, given.grouping)
    usual = UnsupervisedProtocol(threshold, given.minmax, given.match, given.absent_classes, given.grouping)
    asked = threshold if given.threshold is None else given.threshold
    below = thresholds(asked, "--unsupervised.threshold", given.grouping)
    return tuple(replace(usual, threshold=each) for each in below)


OPTIONS_OF = {OPEN_VOCABULARY: "background", UNSUPERVISED: "unsupervised"}
"""The group of options that each protocol has to itself."""


def unused(options: Options, protocol: str) -> list[str]:
    """What is to be said of the options that a protocol has to itself, where it is not measured."""
    group = OPTIONS_OF[protocol]
    return [
        f"--{group}.{name.replace('_', '-')} is {value!r}, but --protocol is {options.protocol!r}: add {protocol} to it"
        for name, value in asdict(getattr(options, group)).items()
        if value != getattr(GROUPS[group](), name)
    ]


def unasked(options: Options, prompts: Sequence[str], further: Sequence[str]) -> list[str]:
    """What is to be said of decoys that no prompt names, and of figures that the prompts of a run cannot give."""
    found = [
        f"--decoys.{name} is {value}, but no prompts have decoys: add {' or '.join(WITH_DECOYS)} to --prompts"
        for name, value in asdict(options.decoys).items()
        if value != getattr(Decoys(), name) and not set(WITH_DECOYS) & set(prompts)
    ]
    of_rows = [name for name in further if name != AVERAGE_PRECISION]
    if of_rows and (options.background.threshold is not None or options.background.competitors):
        found.append(
            f"--metrics is {options.metrics!r}, which is of one row of scores for each class: leave out "
            "--background.threshold and --background.competitors"
        )
    found += of_objects(options, prompts, further)
    if further and not prompts:
        found.append(f"--metrics is {options.metrics!r}, but nothing is asked for: add open_vocabulary to --protocol")
    elif PRESENCE in further and not set(WITH_ABSENT) & set(prompts):
        found.append(
            f"--metrics is {options.metrics!r}, but --prompts is {options.prompts!r}, which names no absent classes to "
            f"tell from present ones: add {', '.join(WITH_ABSENT[:-1])} or {WITH_ABSENT[-1]} to it"
        )
    return found


def of_objects(options: Options, prompts: Sequence[str], further: Sequence[str]) -> list[str]:
    """What is to be said of prompts and figures that do not fit how many objects an image of the set has."""
    from seg4diff_jax.evaluation.benchmarks import named, single

    name = named(options.data)
    if not single(options.data):
        told = f"--metrics is {options.metrics!r}, but {name} names no single object in each image: leave out"
        return [f"{told} {AVERAGE_PRECISION}"] if AVERAGE_PRECISION in further else []
    if other := [kind for kind in prompts if kind != "present"]:
        return [f"--prompts is {options.prompts!r}, but {name} asks for one name in each image: leave out {other[0]}"]
    return []


def heads_described(heads: Sequence[int | None]) -> str:
    single = len(heads) - (None in heads)
    mean = " beside the mean" if None in heads else ""
    return f"; {counted(single, 'head')} of each block{mean}" if single else ""


@contextmanager
def progress(console: Console, images: int, passes: int) -> Iterator[OnImages]:
    """Shows the number of images done, the transformer's images per second, and the mIoU so far."""
    start, first, score = time.perf_counter(), 0, ""
    with counted_pieces(console, "evaluating", images, pieces="images", remark="compiling") as show:

        def advance(done: int, miou: float | None) -> None:
            nonlocal start, first, score
            now, done = time.perf_counter(), min(done, images)
            rate = f"{passes * (done - first) / (now - start):.1f} images/s" if first else "compiling"
            if not first:  # the first batch includes compilation
                start, first = now, done
            score = score if miou is None else f", mIoU {miou:.1f} so far"
            show(done, rate + score)

        yield advance
