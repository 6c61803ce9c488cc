"""Runs `seg4diff perturb`: makes the pictures, scores them, and writes both with a page. `perturb.py` has its options.

perturbation.html   plots, a table and pictures, with nothing beside it
perturbation.json   options, versions, models of the scores, means by block; written last, so that it means: complete
scores.csv          the scores of each picture
00_a_cat/           base.png, block_00.png and so on: the pictures of a prompt, or of a prompt and a seed
progress/           of an unfinished run: what it was asked for
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.table import Table

from seg4diff_jax.analysis.clip import load_clip
from seg4diff_jax.analysis.dino import load_dino
from seg4diff_jax.analysis.perturbation_page import Row, by_models, perturbation_page, plain_title, table
from seg4diff_jax.analysis.perturbation_scores import PerturbationScores, gathered_scores, score_sample
from seg4diff_jax.analysis.perturbed_pictures import perturbed_pictures, variants
from seg4diff_jax.analysis.picture_scores import PictureScorers
from seg4diff_jax.command_line.memory import explaining_full_memory
from seg4diff_jax.command_line.perturb import Asked
from seg4diff_jax.command_line.picture_directory import readable, remove_progress, write_picture
from seg4diff_jax.command_line.prompt_file import prompts_of
from seg4diff_jax.command_line.segment import load_shown, open_named, resumable_directory
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.sources.open import MINIATURE
from seg4diff_jax.images import read_image
from seg4diff_jax.interrupted_runs import DIRECTORY, RUN, asked_before, begin, refuse_changes, write_whole
from seg4diff_jax.models.perturbation import Blur, Perturbation
from seg4diff_jax.quoting import counted
from seg4diff_jax.terminal import Bar, stderr_console
from seg4diff_jax.versions import versions

RECORD, PAGE, SCORES = "perturbation.json", "perturbation.html", "scores.csv"
HOW_STARTED = ("prompt", "prompts", "out", "overwrite", "resume")
"""Options that change no picture, and those that name the prompts."""
REMEDY = "choose a smaller --size or --batch, or --dtype bfloat16"


class Sample(NamedTuple):
    """A prompt by its position, under a seed, and the folder of its pictures."""

    place: int
    seed: int
    prompt: str
    folder: str


def run(options: Any, asked: Asked) -> None:
    """Raises ValueError, or another error of `command_line.AT_FAULT`, if the options do not fit the model or files."""
    console = stderr_console()
    prompts = [options.prompt] if options.prompts is None else prompts_of(options.prompts)
    name = readable(prompts[0] if options.prompts is None else Path(options.prompts).stem)
    default = Path("runs") / "perturb" / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    out = resumable_directory(options, str(default), RECORD)
    checkpoint = open_named(options)
    checkpoint.schedule.sigmas(options.steps)
    checkpoint.schedule.check_sampler(options.sampler)
    wanted = range(checkpoint.transformer.num_layers) if options.blocks is None else options.blocks
    size, blocks = checkpoint.size(asked.size), tuple(sorted(checkpoint.block(block) for block in wanted))
    perturb = asked.of_blocks(blocks)
    samples = listed_samples(prompts, asked.seeds)
    identity = {name: value for name, value in options.as_dict().items() if name not in HOW_STARTED}
    identity |= {"blocks": list(blocks), "size": list(size), "device": jax.devices()[0].device_kind}
    identity |= {f"prompt {number}": prompt for number, prompt in enumerate(prompts, 1)}
    going_on = options.resume and can_go_on(out, identity)
    scorers, without = loaded_scorers(options)
    pipe, dtype, _ = load_shown(console, checkpoint, options)

    if not going_on:
        remove_former(out)
        begin(out / DIRECTORY, {**identity, "folders": [sample.folder for sample in samples]})
    guided = options.guide is not None
    folders = {(sample.place, sample.seed): sample.folder for sample in samples}
    every = variants(len(prompts), asked.seeds, blocks)
    file_of = lambda row: f"{folders[row.place, row.seed]}/{picture_name(row.block)}"
    done = [row for row in every if going_on and (out / file_of(row)).is_file()]
    if going_on:
        console.print(f"going on: {len(done)} of {len(every)} pictures are there")
    made = perturbed_pictures(
        pipe,
        prompts,
        perturb,
        scale=options.guide,
        seeds=asked.seeds,
        batch=options.batch,
        done=done,
        steps=options.steps,
        guidance=options.guidance,
        size=size,
        sampler=options.sampler,
    )
    with Bar(console, "generating", len(every), done=len(done)) as bar, explaining_full_memory(REMEDY):
        for number, (row, picture) in enumerate(made, len(done) + 1):
            (out / file_of(row)).parent.mkdir(exist_ok=True)
            write_picture(out, file_of(row), picture)
            bar.update(number)

    with Bar(console, "scoring", len(samples)) as bar, explaining_full_memory("choose a smaller CLIP or DINO"):
        scores = scored(out, samples, blocks, scorers, bar)
    about = described(perturb, options, size, len(prompts), asked.seeds)
    models = {} if scorers is None else scorers.models
    shown = (
        Row(sample.prompt, pictures_of(out, sample, blocks)) for sample in samples if sample.seed == asked.seeds[0]
    )
    page = perturbation_page(
        shown,
        scores,
        blocks=blocks,
        model=options.model,
        about=about,
        models=models,
        without=without,
        guided=guided,
        expert=pipe.expert_block,
    )
    write_whole(out / DIRECTORY, out / PAGE, page.encode())
    record = {
        **{name: value for name, value in options.as_dict().items() if name not in ("overwrite", "resume")},
        "out": str(out),
        "blocks": blocks,
        "size": size,
        "change": asdict(perturb.change) if isinstance(perturb.change, Blur) else perturb.change,
        "dtype": dtype,
        "device": identity["device"],
        "versions": versions(),
        "models": models,
        "means": None if scores is None else means(scores),
        "samples": [sample._asdict() for sample in samples],
    }
    write_whole(out / DIRECTORY, out / RECORD, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    remove_progress(out)
    if scores is None:
        console.print(without)
    else:
        Console(highlight=False).print(score_table(scores, models, pipe.expert_block, plain_title(guided)))
        how = "guided away from" if guided else "of"
        print(f"CLIP-I is lowest in pictures {how} perturbed block {scores.lowest['CLIP-I']}")
    console.print(
        f"wrote {out}: {PAGE}, {RECORD}, {SCORES}, {samples[0].folder}/{'' if len(samples) == 1 else ', ...'}"
    )


# ---- what is asked for ----------------------------------------------------------------------------------------------


def listed_samples(prompts: Sequence[str], seeds: Sequence[int]) -> list[Sample]:
    """Returns each prompt with each seed, in folders such as 00_a_cat, or 00_a_cat_seed_3 with several seeds."""
    digits = max(2, len(str(len(prompts) - 1)))
    ending = lambda seed: "" if len(seeds) == 1 else f"_seed_{seed}"
    return [
        Sample(place, seed, prompt, f"{place:0{digits}}_{readable(prompt)}{ending(seed)}")
        for place, prompt in enumerate(prompts)
        for seed in seeds
    ]


def loaded_scorers(options: Any) -> tuple[PictureScorers | None, str]:
    """Returns the models that score, and what is said where there are none. Raises CheckpointError as these do.

    Without --clip it is the checkpoint's own, if its directory has an image encoder.
    """
    named = options.clip
    if named is None:
        own = MINIATURE if options.model == "miniature" else Path(options.model).expanduser()
        if (own / "image_encoder").is_dir():
            named = options.model
    if named is None and options.dino is not None:
        raise ValueError(f"--dino scores beside a CLIP, and {options.model} has no image_encoder: name one with --clip")
    if named is None:
        return None, f"no scores: {options.model} has no image_encoder; name a CLIP with --clip"
    return PictureScorers(load_clip(named), None if options.dino is None else load_dino(options.dino)), ""


def can_go_on(out: Path, identity: dict[str, Any]) -> bool:
    """Returns whether `out` has an interrupted run. Raises ValueError if that was asked for something else."""
    if (former := asked_before(out / DIRECTORY)) is None:
        return False
    former.pop("folders", None)  # whose names follow from the rest
    refuse_changes(out / DIRECTORY, former, json.loads(json.dumps(identity)))
    return True


def described(
    perturb: Perturbation, options: Any, size: tuple[int, int], prompts: int, seeds: Sequence[int]
) -> list[str]:
    """Returns what was done, and to what, in two lines."""
    what = "the block is skipped"
    if isinstance(blur := perturb.change, Blur):
        along = "along the text" if blur.over == "text" else "over the image"
        columns = "CLIP's tokens" if blur.text_tokens == "clip" else "all text tokens"
        taps = len(blur.weights())
        what = f"image-to-text attention blurred {along}, sigma {blur.sigma:g}, {taps} taps, {blur.pad}, {columns}"
    steps = "all steps" if perturb.steps is None else f"steps {', '.join(map(str, perturb.steps))}"
    how = f"perturbed guidance {options.guide:g}" if options.guide is not None else f"half: {perturb.half}"
    run = f"{counted(options.steps, 'step')}, guidance {options.guidance:g}, {size[0]} x {size[1]} pixels"
    return [f"{counted(prompts, 'prompt')}, {counted(len(seeds), 'seed')}, {run}", f"{what}; {steps}; {how}"]


# ---- the directory --------------------------------------------------------------------------------------------------


def picture_name(block: int | None) -> str:
    return "base.png" if block is None else f"block_{block:02}.png"


def pictures_of(out: Path, sample: Sample, blocks: Sequence[int]) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Reads the pictures of a sample, the unperturbed one first."""
    return [read_image(out / sample.folder / picture_name(block)) for block in (None, *blocks)]


def remove_former(out: Path) -> None:
    """Removes the files of an earlier run that its record names, or an unfinished run's, and nothing else."""
    folders: list[str] = []
    with suppress(ValueError, KeyError, TypeError):
        folders += [sample["folder"] for sample in read_json(out / RECORD)["samples"]]
    with suppress(ValueError, KeyError, TypeError):
        folders += read_json(out / DIRECTORY / RUN)["folders"]
    for path in out.iterdir() if out.is_dir() else ():
        if path.name in (RECORD, PAGE, SCORES) and (path.is_file() or path.is_symlink()):
            path.unlink()
        elif path.name in folders and path.is_dir() and not path.is_symlink():
            for picture in (*path.glob("block_[0-9]*.png"), path / picture_name(None)):
                picture.unlink(missing_ok=True)
            if not any(path.iterdir()):
                path.rmdir()
    remove_progress(out)


# ---- scores ---------------------------------------------------------------------------------------------------------


def scored(
    out: Path, samples: Sequence[Sample], blocks: Sequence[int], scorers: PictureScorers | None, bar: Bar
) -> PerturbationScores | None:
    """Scores the written pictures, sample by sample, and writes scores.csv. None, and no file, without scorers."""
    if scorers is None:
        return None
    each: list[dict[str, Float[np.ndarray, " pictures"]]] = []
    for number, sample in enumerate(samples, 1):
        each.append(score_sample(scorers, pictures_of(out, sample, blocks), sample.prompt))
        bar.update(number)
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["prompt", "seed", "block", *scorers.models])
    for sample, found in zip(samples, each, strict=True):
        for block, *scores in zip(("base", *blocks), *found.values(), strict=True):
            rows.writerow([sample.prompt, sample.seed, block, *(f"{score:.6f}" for score in scores)])
    write_whole(out / DIRECTORY, out / SCORES, text.getvalue().encode())
    return gathered_scores(each, blocks)


def means(scores: PerturbationScores) -> dict[str, Any]:
    """Returns the means by block as plain values."""
    by_block = {
        name: [
            {"block": block, "mean": float(mean), "standard_error": float(error)}
            for block, mean, error in zip(scores.blocks, *spread, strict=True)
        ]
        for name, spread in scores.by_block.items()
    }
    plain, lowest = {"CLIP-T": scores.plain_clip_t}, scores.lowest
    return {"pictures_per_block": scores.samples, "unperturbed": plain, "perturbed": by_block, "lowest": lowest}


def score_table(scores: PerturbationScores, models: dict[str, str], expert: int | None, plain: str) -> Table:
    """Of each block: means of 100 x cosine over prompts and seeds."""
    drawn = Table("", *models, "", box=None)
    for column in drawn.columns[1:-1]:
        column.justify = "right"
    for block, cells in table(scores):
        title = plain if block is None else f"block {block}"
        drawn.add_row(title, *cells, "the checkpoint's expert" if block is not None and block == expert else "")
    error = f"; ± standard error of {scores.samples} pictures" if scores.samples > 1 else ""
    drawn.caption = f"100 x cosine{error}. {by_models(models)}."
    return drawn
