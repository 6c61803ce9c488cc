"""`seg4diff analyze --statistics`: shares of attention, value norms and similarities of every block, over many samples.

    seg4diff analyze photo.jpg cat sofa --model sd3 --statistics
    seg4diff analyze DIR --count 50 --model sd3 --statistics
    seg4diff analyze --prompts FILE --seeds 3 --model sd3 --statistics

The first is of one image, the second of a folder of labelled images, the third of the runs that generate pictures of
prompts. Images are noised to a level; a generating run is looked at in its own steps. It has the paper's settings: 28
steps, guidance 7.5, noise levels 8 and 28.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from rich.console import Console

from seg4diff_jax.analysis.prompt_statistics import PromptStatistics, on_pictures, while_generating
from seg4diff_jax.analysis.statistics_page import MOST_PICTURES, statistics_page
from seg4diff_jax.analysis.summary import Summary, summarize
from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.command_line.analyze import GUIDANCE, said
from seg4diff_jax.command_line.memory import explaining_full_memory
from seg4diff_jax.command_line.prompt_file import prompts_of
from seg4diff_jax.command_line.segment import load_shown, open_named, output_directory
from seg4diff_jax.data.subset import Subset
from seg4diff_jax.evaluation.benchmarks import Benchmark, folder_benchmark
from seg4diff_jax.evaluation.measurement import Settings
from seg4diff_jax.evaluation.run import evaluate
from seg4diff_jax.flow import check_guidance, check_seed
from seg4diff_jax.images import read_image
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.quoting import counted
from seg4diff_jax.terminal import Bar, stderr_console
from seg4diff_jax.text import class_prompts
from seg4diff_jax.versions import versions

RECORD, PAGE = "statistics.json", "statistics.html"
STEPS = 28
"""Of generating runs, as in the paper."""
PAPER_LEVELS = 8, 28
"""Noise levels, counted from the clean end of 28, at which the paper looks at generating runs."""


SCORED_AT_ONCE = 4
"""Images that are scored by their labels in one batch."""


class Sample(NamedTuple):
    """What is looked at: a prompt, and the image that it is of, in its place in a list. No image: one is generated."""

    place: int
    prompt: str
    image: UInt8[np.ndarray, "height width 3"] | None


def run(options: Any) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it warns that PyTorch is missing
    console = stderr_console()
    others = ("find_expert", "words", "by", "pads", "components", "out", "block")
    if given := [name for name in others if (value := getattr(options, name)) is not None and value is not False]:
        raise ValueError(f"--statistics is of all blocks, by itself: leave out --{given[0].replace('_', '-')}")
    subject = Path(options.image or options.prompts or "prompt")
    default = Path("runs") / "analyze" / f"{subject.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    if Path(options.statistics).is_file():
        raise ValueError(f"--statistics {options.statistics} is a file: put the image before --statistics")
    out = output_directory(options.statistics or str(default), "", options.overwrite, "--statistics")
    refuse_unused(options)
    steps = STEPS if options.steps is None else options.steps
    guidance = GUIDANCE if options.guidance is None else options.guidance
    check_guidance(guidance)
    of_run = {"steps": steps, "guidance": guidance, "sampler": options.sampler}
    for name in ("seeds", "count"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}: expected at least 1")
    seeds = [check_seed(options.seed + number) for number in range(options.seeds or 1)]
    checkpoint = open_named(options)
    folder = labelled(options)
    count, samples = asked_samples(checkpoint, options, folder, console)
    generating = options.image is None
    levels = asked_levels(checkpoint, options, steps if generating else None)
    pipe, dtype, _ = load_shown(console, checkpoint, options)

    found: dict[int, list[PromptStatistics]] = defaultdict(list)
    pictures: list[tuple[str, np.ndarray]] = []
    remedy = explaining_full_memory("choose --dtype bfloat16")
    with Bar(console, "measuring", count * len(seeds)) as bar, remedy:
        for sample, number, seed in ((sample, *each) for sample in samples for each in enumerate(seeds)):
            measured, picture = measure(pipe, sample, levels, seed, of_run)
            for level, statistics in zip(levels, measured, strict=True):
                found[level].append(statistics)
            if len(pictures) < MOST_PICTURES and (generating or number == 0):
                pictures.append((sample.prompt, picture))
            bar.update(sample.place * len(seeds) + number + 1)
        if not found:
            raise ValueError(f"{options.image}: no image shows a class, or all show more than one prompt holds")
        summaries = {level: summarize(each) for level, each in found.items()}
        if folder is not None:
            for level, scores in scores_by_block(pipe, folder, levels, seeds).items():
                summaries[level] = replace(summaries[level], mean_ious=scores)

    what = "generating run" if generating else "noised image"
    about = f"{counted(len(found[levels[0]]), what)}, {counted(len(seeds), 'seed')}"
    if generating:
        guided = f"guidance {guidance:g}, the half that follows the prompt" if guidance > 1 else "no guidance"
        about += f", {counted(steps, 'step')}, {guided}"
    last = steps if generating else PAPER_LEVELS[-1]
    titles = {f"Noise level {level} of {last}": summary for level, summary in summaries.items()}
    page = statistics_page(titles, model=options.model, about=about, expert=pipe.expert_block, pictures=pictures)
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text(page, encoding="utf-8")
    record = {
        **options.as_dict(),
        **({"steps": steps, "guidance": guidance} if generating else {}),
        "dtype": dtype,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "levels": {level: as_json(summary) for level, summary in summaries.items()},
    }
    (out / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for level, summary in summaries.items():
        hints = ", ".join(f"{hint} {block}" for hint, block in summary.candidates.items())
        print(f"noise level {level}: block by hint: {hints}")
    console.print(f"wrote {out}: {PAGE}, {RECORD}")


def asked_samples(
    checkpoint: Checkpoint, options: Any, folder: Benchmark | None, console: Console
) -> tuple[int, Iterable[Sample]]:
    """Returns what the options name, and how many that are at most.

    Images of a folder are read one by one; those that show no class are left out, and those whose classes need several
    prompts, which the console hears.

    Raises ValueError when the options name nothing, or two things.
    """
    prompt = options.prompt
    if options.image is None:
        if bool(prompt) == bool(options.prompts):
            found = "both" if prompt else "neither"
            raise ValueError(f"without an image, say what to generate: --prompt or --prompts FILE: found {found}")
        prompts = (prompts_of(options.prompts) if options.prompts else [prompt])[: options.count]
        return len(prompts), [Sample(place, each, None) for place, each in enumerate(prompts)]
    if options.prompts is not None:
        raise ValueError("--prompts is for generating runs: leave out the image")
    if folder is None:
        return 1, [Sample(0, said(checkpoint, options), read_image(options.image))]
    if options.classes or prompt is not None:
        raise ValueError("the prompt of a folder's image is its own classes: leave out CLASS and --prompt")

    def read() -> Iterator[Sample]:
        for place in range(len(folder.source)):
            item = folder.source[place]
            present = [name for number, name in enumerate(folder.classes) if (item["labels"] == number).any()]
            prompts = class_prompts(checkpoint.tokenizers, present).prompts if present else ()
            if len(prompts) > 1:
                console.print(f"left out {item['name']}: its {len(present)} classes need {len(prompts)} prompts")
            elif prompts:
                yield Sample(place, prompts[0], item["image"])

    return len(folder.source), read()


def labelled(options: Any) -> Benchmark | None:
    """The folder's images, the first `--count` of them; None where no folder is looked at."""
    if options.image is None or not Path(options.image).is_dir():
        return None
    benchmark = folder_benchmark(options.image)
    source: Any = benchmark.source
    return replace(benchmark, source=Subset(source, range(len(source))[: options.count]))


def scores_by_block(
    pipe: Pipeline, folder: Benchmark, levels: list[int], seeds: list[int]
) -> dict[int, Float[np.ndarray, " blocks"]]:
    """Returns each block's mean IoU in percent at each noise level, the mean over seeds, as `evaluate.py` scores."""
    blocks = tuple(range(pipe.transformer.depth))
    settings = Settings(blocks, tuple(levels), tuple(seeds), batch_size=min(SCORED_AT_ONCE, len(folder.source)))
    found = {(level, block): list[float]() for level in levels for block in blocks}
    for row in evaluate(pipe, folder, settings).rows:
        assert row.step is not None
        assert row.block is not None
        found[row.step, row.block].append(np.nan if row.metrics.miou is None else row.metrics.miou)
    return {level: np.array([np.mean(found[level, block]) for block in blocks]) for level in levels}


def refuse_unused(options: Any) -> None:
    """Raises ValueError for an option that would change nothing."""
    several = options.prompts is not None or (options.image is not None and Path(options.image).is_dir())
    if options.count is not None and not several:
        raise ValueError("--count is of a folder or of --prompts: this is one sample")
    if options.image is None and options.step is not None:
        raise ValueError("a generating run is looked at in --at-steps: leave out --step")
    if options.step is not None and options.at_steps:
        raise ValueError("--step and --at-steps both name noise levels: leave out one")
    for name in ("steps", "guidance", "sampler"):
        if options.image is not None and getattr(options, name) is not None:
            raise ValueError(f"--{name} is of generating runs: leave out the image, or --{name}")


def asked_levels(checkpoint: Checkpoint, options: Any, steps: int | None) -> list[int]:
    """Returns the noise levels, counted from the clean end. Raises ValueError for one that there is not.

    Args:
      steps: of a generating run; None: images are noised.
    """
    last = PAPER_LEVELS[-1] if steps is None else steps
    if steps is not None:
        checkpoint.schedule.sigmas(steps)
        checkpoint.schedule.check_sampler(options.sampler)
        levels = options.at_steps or [max(1, round(level * last / PAPER_LEVELS[-1])) for level in PAPER_LEVELS]
    else:
        levels = options.at_steps or [checkpoint.step(options.step)]
    if beyond := [level for level in levels if not 1 <= level <= last]:
        raise ValueError(f"--at-steps names {beyond[0]}: expected 1 (nearly clean) to {last} (pure noise)")
    return sorted(set(levels))


def measure(
    pipe: Pipeline, sample: Sample, levels: list[int], seed: int, run: Mapping[str, Any]
) -> tuple[list[PromptStatistics], UInt8[np.ndarray, "height width 3"]]:
    """Returns a sample's statistics at each noise level, and its picture. `run`: options of a generating run."""
    prompts, first = [sample.prompt], sample.place
    if sample.image is None:
        found, (picture,) = while_generating(pipe, prompts, at_steps=levels, seed=seed, first=first, **run)
        return found, picture
    found = [on_pictures(pipe, [sample.image], prompts, step=step, seed=seed, first=first) for step in levels]
    return found, sample.image


def as_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain values. Numbers that do not exist are null."""
    plain = lambda values: [None if not np.isfinite(value) else float(value) for value in values]
    return {
        "samples": summary.samples,
        "uniform_share_of_text": summary.uniform,
        "candidates": summary.candidates,
        "mean IoU by labels, %": None if summary.mean_ious is None else plain(summary.mean_ious),
        "blocks": {name: {"mean": plain(m), "deviation": plain(d)} for name, (m, d) in summary.quantities.items()},
        "heads": {
            "image to text": [plain(heads) for heads in summary.text_shares],
            "norm of text as a multiple of the image's": [plain(heads) for heads in summary.norm_ratios],
        },
    }
