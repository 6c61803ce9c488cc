"""`seg4diff generate PROMPT... --model MODEL`: generates images from prompts."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jaxtyping import UInt8
from jsonargparse import ArgumentParser
from PIL import Image

from seg4diff_jax.batching import one_for_each
from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.class_names import OneClassWarning, one_word
from seg4diff_jax.command_line.memory import explaining_full_memory
from seg4diff_jax.command_line.segment import (
    load_shown,
    model_arguments,
    open_named,
    output_directory,
    parse_size,
)
from seg4diff_jax.compilation import CompilationClock
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.flow import LARGEST_SEED, Sampler, check_guidance, check_seed, image_noise
from seg4diff_jax.generated_masks import mask_step, words_of
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.pipeline_options import RunOptions
from seg4diff_jax.reporting.overlays import contact_sheet
from seg4diff_jax.reporting.segmentation_files import (
    file_name,
    remove_segmentation,
    write_class_masks,
    write_segmentation,
)
from seg4diff_jax.segmentation.open_vocabulary import Segmentation
from seg4diff_jax.terminal import Bar, stderr_console
from seg4diff_jax.versions import versions

RECORD, GRID = "generation.json", "grid.png"
"""Files beside the pictures. The record is written last, so a directory with a record is complete."""
CELL = 256, 512
"""Shortest and longest side of a picture in the grid, in pixels."""


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("prompts", type=str, nargs="+", metavar="PROMPT", help='what to picture, such as: "a cat on a sofa"')
    add("--out", type=str, help="directory for the pictures; default: runs/generate/<first prompt>-<time>")
    add("--overwrite", action="store_true", help="replace files of an earlier run in --out")
    add("--negative", type=str, default="", metavar="PROMPT", help="what guidance leads away from")
    add("--steps", type=int, default=28, help="Euler steps from noise to picture")
    add(
        "--sampler",
        type=str,
        choices=list(get_args(Sampler)),
        help="also where the checkpoint was saved with another scheduler, which is refused by default",
    )
    add("--guidance", type=float, default=7.0, help="scale; at 1 or less there is none, and a step costs half")
    add("--seed", type=int, default=0, help=f"of the noise: 0 to {LARGEST_SEED}")
    add("--count", type=int, default=1, help="pictures of each prompt")
    add("--batch", type=int, default=1, help="pictures made at once; more need more memory and change none")
    add("--size", type=str, metavar="HxW", help="height x width of the pictures, as in 768x1024; default: as trained")
    add(
        "--segment", type=str, nargs="+", metavar="WORD", help="words of all prompts to write masks of, read in the run"
    )
    add("--block", type=int, help="transformer block to read masks from; default: the checkpoint's own expert block")
    add(
        "--at-step",
        type=int,
        help="step to read masks in: 1 (the last) to --steps (the first); default: the checkpoint's, scaled to --steps",
    )
    model_arguments(parser)


def run(options: Any) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it warns that PyTorch is missing
    console = stderr_console()
    default = Path("runs") / "generate" / f"{readable(options.prompts[0])}-{datetime.now():%Y%m%d-%H%M%S}"
    out = output_directory(options.out or str(default), "", options.overwrite)
    checkpoint, size = open_checked(options)
    reading = masks_checked(options, checkpoint)
    if reading and (remark := one_word(options.segment)):
        console.print(f"warning: {remark}")
    pipe, dtype, loading = load_shown(console, checkpoint, options)

    out.mkdir(parents=True, exist_ok=True)
    remove_former(out)
    names, pictures, masks = file_names(options.prompts, options.count), [], []
    remedy = "choose a smaller --size or --batch, or --dtype bfloat16"
    with (
        Bar(console, "generating", len(names)) as bar,
        CompilationClock() as compilation,
        explaining_full_memory(remedy),
    ):
        start = time.perf_counter()
        for name, (picture, segmentation) in zip(names, generated(pipe, options, size, reading), strict=True):
            Image.fromarray(picture).save(out / name)
            pictures.append(picture)
            masks.append(segmentation)
            bar.update(len(pictures))
        total = time.perf_counter() - start
    seconds = {"loading": loading, "compiling": compilation.seconds, "running": total - compilation.seconds}
    console.print(
        f"generated {len(pictures)} of {size[0]} x {size[1]} pixels in {total:.1f} s: compiling "
        f"{seconds['compiling']:.1f} s, running {seconds['running']:.1f} s"
    )

    each = one_for_each(options.prompts, options.count)
    if len(pictures) > 1:
        grid(each, options.count, pictures).save(out / GRID)
    record = {
        **options.as_dict(),
        **reading,
        "out": str(out),
        "dtype": dtype,
        "size": list(size),
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "versions": versions(),
        "pictures": [{"file": name, "prompt": prompt} for name, prompt in zip(names, each, strict=True)],
    }
    if reading:
        with console.status("drawing masks"):
            for made, picture, segmentation in zip(record["pictures"], pictures, masks, strict=True):
                made["masks"] = f"{Path(made['file']).stem}_masks"
                how = {key: value for key, value in record.items() if key != "pictures"} | made
                write_segmentation(out / made["masks"], picture, segmentation, how)
                write_class_masks(out / made["masks"], segmentation)
    (out / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    folders = [f"{made['masks']}/" for made in record["pictures"]] if reading else []
    wrote = [*names, *folders, *([GRID] if len(pictures) > 1 else []), RECORD]
    console.print(f"wrote {out}: {', '.join(wrote if len(wrote) < 9 else [*wrote[:3], '...', *wrote[-3:]])}")


def remove_former(out: Path) -> None:
    """Removes the files of an earlier run that its record names, its masks among them, and nothing else."""
    try:
        pictures = read_json(out / RECORD)["pictures"]
        former = {RECORD, GRID, *(Path(picture["file"]).name for picture in pictures)}
        masks = {Path(picture["masks"]).name for picture in pictures if "masks" in picture}
    except (ValueError, KeyError, TypeError):
        return
    for path in out.iterdir():
        if path.name in former and (path.is_file() or path.is_symlink()):
            path.unlink()
        elif path.name in masks and path.is_dir() and not path.is_symlink():
            remove_segmentation(path)


def open_checked(options: Any) -> tuple[Checkpoint, tuple[int, int]]:
    """Opens the checkpoint. Returns it, and height and width of the pictures.

    Raises:
      ValueError: options are out of bounds or do not fit the model.
    """
    wanted = parse_size(options.size)
    check_seed(options.seed)
    check_guidance(options.guidance)
    for name in ("count", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}: expected at least 1")
    checkpoint = open_named(options)
    checkpoint.schedule.sigmas(options.steps)
    checkpoint.schedule.check_sampler(options.sampler)
    return checkpoint, checkpoint.size(wanted)


def masks_checked(options: Any, checkpoint: Checkpoint) -> dict[str, int]:
    """Returns the block and the step to read masks in, by name; none if no masks are asked for.

    Raises:
      ValueError: a word is not in each prompt; or block or step are out of bounds, or given without --segment.
    """
    if options.segment is None:
        if options.block is not None or options.at_step is not None:
            raise ValueError("--block and --at-step say where masks are read: name words of the prompt with --segment")
        return {}
    for prompt in options.prompts:
        words_of(checkpoint.tokenizers, prompt, options.segment)
    step = mask_step(options.at_step, checkpoint.step(), options.steps)
    return {"block": checkpoint.block(options.block), "at_step": step}


def generated(
    pipe: Pipeline, options: Any, size: tuple[int, int], reading: Mapping[str, int]
) -> Iterator[tuple[UInt8[np.ndarray, "height width 3"], Segmentation | None]]:
    """Yields the pictures of all prompts, generated in batches of `--batch`, and their masks if these are asked for.

    Args:
      reading: what `masks_checked` returned.
    """
    prompts = one_for_each(options.prompts, options.count)
    batch, factor = min(options.batch, len(prompts)), pipe.view.downsampling
    latents = size[0] // factor, size[1] // factor, pipe.view.channels
    for start in range(0, len(prompts), batch):
        places = range(start, min(start + batch, len(prompts)))
        # The last batch is padded with its last picture, so that all batches use one compiled program.
        filled = [*places, *[places[-1]] * (batch - len(places))]
        batched = [prompts[place] for place in filled]
        how: RunOptions = {
            "negative_prompt": options.negative,
            "steps": options.steps,
            "guidance": options.guidance,
            "noise": np.asarray(image_noise(options.seed, filled, latents)),
            "size": size,
            "sampler": options.sampler,
        }
        if reading:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OneClassWarning)  # the same is said before the model is loaded
                block, at_step = reading["block"], reading["at_step"]
                made = pipe.generate(batched, segment=options.segment, block=block, at_step=at_step, **how)
        else:
            made = [(picture, None) for picture in pipe.generate(batched, **how)]
        yield from made[: len(places)]


def readable(prompt: str) -> str:
    return file_name(prompt) if re.search(r"\w", prompt) else "picture"


def file_names(prompts: list[str], count: int) -> list[str]:
    """Returns file names such as 00_a_cat.png, or 00_a_cat_1.png with several pictures per prompt."""
    digits, own = max(2, len(str(len(prompts) - 1))), len(str(count))
    numbers = [""] if count == 1 else [f"_{number:0{own}}" for number in range(1, count + 1)]
    return [
        f"{index:0{digits}}_{readable(prompt)}{number}.png"
        for index, prompt in enumerate(prompts)
        for number in numbers
    ]


def grid(prompts: list[str], count: int, pictures: list[UInt8[np.ndarray, "height width 3"]]) -> Image.Image:
    """Draws all pictures in a grid, under their prompts. Small pictures are enlarged, large ones reduced."""
    height, width = pictures[0].shape[:2]
    scale = max(1.0, CELL[0] / min(height, width))
    scale = min(scale, CELL[1] / max(height, width))
    cell = max(1, round(scale * width)), max(1, round(scale * height))
    numbers = [f"{index % count + 1} of {count}" if count > 1 else "" for index in range(len(pictures))]
    return contact_sheet(
        [
            (prompt, number, Image.fromarray(picture).resize(cell, Image.Resampling.LANCZOS))
            for prompt, number, picture in zip(prompts, numbers, pictures, strict=True)
        ]
    )
