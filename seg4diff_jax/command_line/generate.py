"""`seg4diff generate PROMPT... --model MODEL`: generates images from prompts."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jaxtyping import UInt8
from jsonargparse import ArgumentParser
from rich.console import Console

from seg4diff_jax.batching import one_for_each
from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.class_names import OneClassWarning, one_word
from seg4diff_jax.command_line.memory import explaining_full_memory
from seg4diff_jax.command_line.picture_directory import (
    GRID,
    MOST_IN_GRID,
    RECORD,
    Layout,
    grid,
    picture_files,
    readable,
    remove_former,
    remove_progress,
    write_picture,
)
from seg4diff_jax.command_line.prompt_file import prompts_of
from seg4diff_jax.command_line.segment import load_shown, model_arguments, open_named, parse_size, resumable_directory
from seg4diff_jax.compilation import CompilationClock
from seg4diff_jax.flow import LARGEST_SEED, Sampler, check_guidance, check_seed, image_noise, steps_from_image
from seg4diff_jax.generated_masks import mask_step, words_of
from seg4diff_jax.images import read_image
from seg4diff_jax.interrupted_runs import DIRECTORY, RUN, asked_before, begin, refuse_changes, write_whole
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.pipeline_options import STRENGTH, RunOptions
from seg4diff_jax.quoting import quoted
from seg4diff_jax.reporting.segmentation_files import write_class_masks, write_segmentation
from seg4diff_jax.segmentation.open_vocabulary import Segmentation
from seg4diff_jax.terminal import Bar, stderr_console
from seg4diff_jax.versions import versions

HOW_STARTED = ("prompt", "prompts", "out", "overwrite", "resume")
"""Options that change no picture, and those that name the prompts."""
Made = tuple[int, UInt8[np.ndarray, "height width 3"], Segmentation | None]
"""The place of a picture among all, the picture, and its masks if these are asked for."""
PER_PROMPT = {"numbered": 1, "compbench": 10}
"""Pictures of each prompt unless --count says another number. T2I-CompBench++ scores ten."""


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("prompt", type=str, nargs="*", metavar="PROMPT", help='what to picture, such as: "a cat on a sofa"')
    add("--prompts", type=str, metavar="FILE", help="the same by file, a prompt a line")
    add("--out", type=str, help="directory for the pictures; default: runs/generate/<first prompt>-<time>")
    add("--overwrite", action="store_true", help="replace files of an earlier run in --out")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    add(
        "--layout",
        choices=list(get_args(Layout)),
        default="numbered",
        help="names of the pictures; compbench: samples/<prompt>_<number>.png, as T2I-CompBench++'s scorers read them",
    )
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
    add("--count", type=int, help="pictures of each prompt; default: 1, or 10 for --layout compbench")
    add("--batch", type=int, default=1, help="pictures made at once; more need more memory and change none")
    add("--size", type=str, metavar="HxW", help="height x width of the pictures, as in 768x1024; default: as trained")
    add("--image", type=str, metavar="FILE", help="what pictures start from instead of noise; they keep its aspect")
    add("--strength", type=float, help="how far from --image they may go, above 0 and at most 1; default: 0.6")
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
    prompts = asked_prompts(options)
    count = PER_PROMPT[options.layout] if options.count is None else options.count
    default = Path("runs") / "generate" / f"{readable(prompts[0])}-{datetime.now():%Y%m%d-%H%M%S}"
    out = resumable_directory(options, str(default), RECORD)
    checkpoint, size = open_checked(options, count)
    reading = masks_checked(options, prompts, checkpoint)
    if reading and (remark := one_word(options.segment)):
        console.print(f"warning: {remark}")
    pictures: list[dict[str, str]] = [
        {"file": file, "prompt": prompt}
        for file, prompt in zip(
            picture_files(prompts, count, options.layout), one_for_each(prompts, count), strict=True
        )
    ]
    if reading:
        pictures = [{**picture, "masks": f"{Path(picture['file']).stem}_masks"} for picture in pictures]
    asked = {name: value for name, value in options.as_dict().items() if name not in HOW_STARTED}
    asked["strength"] = None if options.image is None else STRENGTH if options.strength is None else options.strength
    asked |= {**reading, "size": list(size), "count": count, "device": jax.devices()[0].device_kind, "prompts": prompts}
    going_on = options.resume and can_go_on(out, asked)
    pipe, dtype, loading = load_shown(console, checkpoint, options)

    if not going_on:
        remove_former(out)
        begin(out / DIRECTORY, {**asked, "pictures": pictures})
    left = [place for place, made in enumerate(pictures) if not (going_on and (out / made["file"]).is_file())]
    if going_on:
        console.print(f"going on: {len(pictures) - len(left)} of {len(pictures)} pictures are there")
    record = {**asked, "out": str(out), "dtype": dtype, "versions": versions()}
    made = generated(pipe, options, [picture["prompt"] for picture in pictures], left, size, reading)
    total, compiling = write_pictures(console, out, made, pictures, record, done=len(pictures) - len(left))
    seconds = {"loading": loading, "compiling": compiling, "running": total - compiling}
    console.print(
        f"generated {len(left)} of {size[0]} x {size[1]} pixels in {total:.1f} s: compiling "
        f"{seconds['compiling']:.1f} s, running {seconds['running']:.1f} s"
    )
    if len(pictures) > 1:
        first = pictures[:MOST_IN_GRID]
        shown = (read_image(out / picture["file"]) for picture in first)
        grid([picture["prompt"] for picture in first], count, shown).save(out / GRID)
    record |= {"seconds": seconds, "pictures": pictures}
    write_whole(out / DIRECTORY, out / RECORD, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    remove_progress(out)
    wrote = [picture["file"] for picture in pictures] + [f"{picture['masks']}/" for picture in pictures if reading]
    wrote += [*([GRID] if len(pictures) > 1 else []), RECORD]
    console.print(f"wrote {out}: {', '.join(wrote if len(wrote) < 9 else [*wrote[:3], '...', *wrote[-3:]])}")


def asked_prompts(options: Any) -> list[str]:
    """Returns the prompts that are named, or those of the file. Raises ValueError for both, neither and an empty file.

    Blank lines of the file are left out.
    """
    if bool(options.prompt) == (options.prompts is not None):
        found = "both" if options.prompt else "neither"
        raise ValueError(f"say what to picture: PROMPT, or --prompts FILE with a prompt a line: found {found}")
    return options.prompt if options.prompts is None else prompts_of(options.prompts)


def can_go_on(out: Path, asked: Mapping[str, Any]) -> bool:
    """Returns whether `out` has an interrupted run. Raises ValueError if that was asked for something else."""
    if (former := asked_before(out / DIRECTORY)) is None:
        return False
    former.pop("pictures", None)  # whose names follow from the rest
    if not isinstance(former.get("prompts"), list):
        where = out / DIRECTORY / RUN
        raise ValueError(f"{where}: prompts is {quoted(former.get('prompts'))}: give --overwrite to begin anew")
    refuse_changes(out / DIRECTORY, _by_prompt(former), _by_prompt(asked))
    return True


def _by_prompt(asked: Mapping[str, Any]) -> dict[str, Any]:
    numbered = {f"prompt {number}": prompt for number, prompt in enumerate(asked["prompts"], 1)}
    return {name: value for name, value in asked.items() if name != "prompts"} | numbered


def open_checked(options: Any, count: int) -> tuple[Checkpoint, tuple[int, int]]:
    """Opens the checkpoint. Returns it, and height and width of the pictures.

    Raises:
      ValueError: options are out of bounds or do not fit the model.
    """
    wanted = parse_size(options.size)
    check_seed(options.seed)
    check_guidance(options.guidance)
    for name, value in (("count", count), ("batch", options.batch)):
        if value < 1:
            raise ValueError(f"--{name} is {value}: expected at least 1")
    taken_steps(options)
    checkpoint = open_named(options)
    checkpoint.schedule.sigmas(options.steps)
    checkpoint.schedule.check_sampler(options.sampler)
    if options.image is not None:
        return checkpoint, checkpoint.view.common_size([options.image], wanted)
    return checkpoint, checkpoint.size(wanted)


def taken_steps(options: Any) -> int:
    """Returns how many steps are taken: fewer from an image. Raises ValueError for strength, also without an image."""
    if options.image is not None:
        return steps_from_image(options.steps, STRENGTH if options.strength is None else options.strength)
    if options.strength is not None:
        raise ValueError("--strength says how far to go from an image: name one with --image")
    return options.steps


def masks_checked(options: Any, prompts: Sequence[str], checkpoint: Checkpoint) -> dict[str, int]:
    """Returns the block and the step to read masks in, by name; none if no masks are asked for.

    Raises:
      ValueError: a word is not in each prompt; block or step are out of bounds, or given without --segment; or the
        layout has no place for masks.
    """
    if options.segment is None:
        if options.block is not None or options.at_step is not None:
            raise ValueError("--block and --at-step say where masks are read: name words of the prompt with --segment")
        return {}
    if options.layout == "compbench":
        raise ValueError("--layout compbench is for scorers that know no masks: leave out --segment, or --layout")
    for prompt in prompts:
        words_of(checkpoint.tokenizers, prompt, options.segment)
    step = mask_step(options.at_step, checkpoint.step(), options.steps, taken_steps(options))
    return {"block": checkpoint.block(options.block), "at_step": step}


def write_pictures(
    console: Console,
    out: Path,
    made: Iterable[Made],
    pictures: Sequence[Mapping[str, str]],
    record: Mapping[str, Any],
    done: int,
) -> tuple[float, float]:
    """Writes pictures and masks as they are made. Returns the seconds that it took, and those of compiling in them.

    Args:
      pictures: what the record says of each.
      record: what segmentation.json says of the run.
      done: how many pictures are there before.
    """
    (out / pictures[0]["file"]).parent.mkdir(exist_ok=True)
    remedy = "choose a smaller --size or --batch, or --dtype bfloat16"
    with (
        Bar(console, "generating", len(pictures), done=done) as bar,
        CompilationClock() as compilation,
        explaining_full_memory(remedy),
    ):
        start = time.perf_counter()
        for number, (place, picture, segmentation) in enumerate(made, done + 1):
            if segmentation is not None:
                directory = out / pictures[place]["masks"]
                write_segmentation(directory, picture, segmentation, {**record, **pictures[place]})
                write_class_masks(directory, segmentation)
            write_picture(out, pictures[place]["file"], picture)  # after its masks: what has a picture is done
            bar.update(number)
        return time.perf_counter() - start, compilation.seconds


def generated(
    pipe: Pipeline,
    options: Any,
    prompts: list[str],
    left: Collection[int],
    size: tuple[int, int],
    reading: Mapping[str, int],
) -> Iterator[Made]:
    """Yields the pictures that are left to make, each with its place, and their masks if these are asked for.

    Pictures are made in batches of `--batch`. Which pictures share a batch does not depend on what is left, so that a
    run that was interrupted makes the same as one that was not.

    Args:
      prompts: one for each picture.
      left: places of the pictures to make.
      reading: what `masks_checked` returned.
    """
    left = frozenset(left)
    batch, factor = min(options.batch, len(prompts)), pipe.view.downsampling
    latents = size[0] // factor, size[1] // factor, pipe.view.channels
    for start in range(0, len(prompts), batch):
        places = range(start, min(start + batch, len(prompts)))
        if left.isdisjoint(places):
            continue
        # The last batch is padded with its last picture, so that all batches use one compiled program.
        filled = [*places, *[places[-1]] * (batch - len(places))]
        batched = [prompts[place] for place in filled]
        for prompt in dict.fromkeys(batched):
            pipe.encode_prompts(prompt)  # by itself, and kept: several at once would differ in the last digits
        how: RunOptions = {
            "negative_prompt": options.negative,
            "steps": options.steps,
            "guidance": options.guidance,
            "noise": np.asarray(image_noise(options.seed, filled, latents)),
            "size": size,
            "sampler": options.sampler,
            "image": options.image,
            "strength": options.strength,
        }
        if reading:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OneClassWarning)  # the same is said before the model is loaded
                block, at_step = reading["block"], reading["at_step"]
                made = pipe.generate(batched, segment=options.segment, block=block, at_step=at_step, **how)
        else:
            made = [(picture, None) for picture in pipe.generate(batched, **how)]
        each = zip(places, made, strict=False)
        yield from ((place, picture, masks) for place, (picture, masks) in each if place in left)
