"""What a model's attention says of an image.

    seg4diff analyze photo.jpg cat sofa --find-expert --model sd3
    seg4diff analyze photo.jpg --prompt "a cat on a sofa" --words cat sofa --model sd3 --out words.png
    seg4diff analyze photo.jpg --prompt "a cat on a sofa" --words cat --by heads --model sd3 --out heads.png
    seg4diff analyze --prompt "a cat on a sofa" --words cat --by levels --model sd3 --out levels.png
    seg4diff analyze --prompts prompts.txt --statistics runs/blocks --model sd3

The first shows which block attends to text most, the second draws where the attention to words lies, the third what
each head of a block has of it. Without an image it is the run that generates one which is looked at. The last writes a
page of every block's shares of attention and value norms, in the runs that generate pictures of the prompts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from jsonargparse import ArgumentParser
from PIL import Image
from rich.console import Console
from rich.table import Table

from seg4diff_jax.analysis.generating_records import generating_records
from seg4diff_jax.analysis.principal_components import ComponentsReader, block_components
from seg4diff_jax.analysis.prompt_statistics import PromptStatistics, noised_squares, on_pictures
from seg4diff_jax.analysis.word_views import (
    BOTH_WAYS,
    HEADS_AVERAGED,
    HEADS_KEPT,
    LEVELS,
    both_directions,
    by_blocks,
    by_heads,
    by_levels,
    of_pads,
    seen_in_image,
    seen_while_generating,
)
from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.command_line.memory import TO_LOAD, explaining_full_memory
from seg4diff_jax.command_line.segment import check_writable, load_shown, model_arguments, open_named
from seg4diff_jax.flow import LARGEST_SEED, Sampler, check_seed
from seg4diff_jax.generated_masks import mask_step
from seg4diff_jax.images import read_image
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.pipeline_options import RunOptions
from seg4diff_jax.prompt_attention import text_columns
from seg4diff_jax.reporting.component_sheet import component_sheet
from seg4diff_jax.reporting.drawings import draw_maps, draw_words
from seg4diff_jax.terminal import stderr_console
from seg4diff_jax.text import class_prompts

GUIDANCE = 7.5
"""Of generating runs, as in the paper."""
VIEWS = "heads", "blocks", "levels", "directions"
ALL_BLOCKS = VIEWS[1:]


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add(
        "image",
        type=str,
        nargs="?",
        help="image file; nothing: the run that generates one; or, for --statistics, a folder",
    )
    add("classes", type=str, nargs="*", metavar="CLASS", help="what is in it: the words of the prompt")
    add("--prompt", type=str, help="what is in it, in a sentence instead of CLASS")
    add("--find-expert", action="store_true", help="show how much attention each block's image tokens give to the text")
    add(
        "--words",
        type=str,
        nargs="*",
        metavar="WORD",
        help="draw where attention to WORD lies, wherever the prompt says it; without WORD: to each CLASS or word",
    )
    add(
        "--by",
        choices=list(VIEWS),
        help="with one WORD: its map by head, by block, by block and noise level (levels), or in both directions",
    )
    add("--components", action="store_true", help="draw the principal components of all blocks' queries, keys, values")
    add("--pads", action="store_true", help="draw the maps of an empty prompt's tokens: start, end and pads")
    add(
        "--statistics",
        type=str,
        nargs="?",
        const="",
        metavar="DIR",
        help="write a page of all blocks' shares of attention and value norms; default: runs/analyze/<name>-<time>",
    )
    add("--prompts", type=str, metavar="FILE", help="a prompt a line: --statistics of the runs that generate pictures")
    add("--seeds", type=int, help="how many seeds --statistics takes, from --seed on; default: 1")
    add("--count", type=int, help="how many images of a folder, or prompts of a file; default: all")
    add("--at-steps", type=int, nargs="+", metavar="STEP", help="noise levels of --statistics, or of --by levels")
    add("--steps", type=int, help="of the runs that generate pictures; default: 28")
    add("--guidance", type=float, help="of the runs that generate pictures; default: 7.5")
    add("--sampler", choices=list(get_args(Sampler)), help="of these runs, as for generate")
    add("--out", type=str, metavar="FILE", help="PNG that is drawn; default: runs/analyze/<image name>-<time>.png")
    add("--overwrite", action="store_true", help="replace a file that --out names")
    add("--block", type=int, help="transformer block that is drawn; default: the checkpoint's own expert block")
    add("--step", type=int, help="noise level: 1 (nearly clean) to 28, or --steps; default: the checkpoint's own")
    add("--seed", type=int, default=0, help=f"of the noise: 0 to {LARGEST_SEED}")
    model_arguments(parser)


def run(options: Any) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it warns that PyTorch is missing
    console = stderr_console()
    if options.statistics is not None:
        import_module("seg4diff_jax.command_line.statistics").run(options)  # its plots and pages are of an extra
        return
    asked = [f"--{name}" for name in ("words", "pads", "components") if getattr(options, name) not in (None, False)]
    if not options.find_expert and not asked:
        raise ValueError("say what to analyze: --find-expert, --words, --pads, --components or --statistics")
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} are pictures of their own: ask for one at a time")
    if options.pads and (options.by or options.classes or options.prompt is not None):
        raise ValueError("--pads is of an empty prompt: leave out CLASS, --prompt and --by")
    if options.pads and options.find_expert:
        raise ValueError("--pads is of an empty prompt and --find-expert of one with words: ask for one at a time")
    if options.image is None and (options.find_expert or options.classes):
        raise ValueError("name an image: without one --words, --pads, --components and --statistics look at a run")
    of_statistics = ["prompts", "count", "seeds"]
    if options.image is not None:
        of_statistics += ["steps", "guidance", "sampler"]
    if options.by != "levels":
        of_statistics.append("at_steps")
    if only := [name for name in of_statistics if getattr(options, name) is not None]:
        others = " or of --by levels" if only[0] == "at_steps" else ""
        others = " or of runs without an image" if only[0] in ("steps", "guidance", "sampler") else others
        raise ValueError(f"--{only[0].replace('_', '-')} is of --statistics{others}, which is not given")
    if options.by == "levels" and options.step is not None and not options.find_expert:
        raise ValueError("--by levels draws several noise levels: name them with --at-steps instead of --step")
    if not asked and options.out is not None:
        raise ValueError("--out is of --words, --pads and --components, which are not given")
    if options.block is not None and (not asked or _of_all_blocks(options)):
        raise ValueError("--block is of --words, of --by heads and of --pads: what is asked for is of all blocks")
    if options.by is not None and (options.words is None or len(options.words) != 1):
        raise ValueError("--by takes one word: give it to --words")
    check_seed(options.seed)
    pixels = None if options.image is None else read_image(options.image)
    checkpoint = open_named(options)
    prompt = "" if options.pads else said(checkpoint, options)
    steps = LEVELS[-1] if options.steps is None else options.steps
    levels = asked_levels(checkpoint, options, None if pixels is not None else steps)
    drawing = asked_drawing(checkpoint, prompt, options) if asked else None
    last = None if drawing is None or options.find_expert else drawing.block
    blocks = None if last is None or pixels is None else last + 1  # a run needs all
    pipe, _, _ = load_shown(console, checkpoint, options, blocks)
    if options.find_expert:
        assert pixels is not None, "it is of an image"
        with console.status("compiling and measuring"), explaining_full_memory(TO_LOAD):
            found = on_pictures(pipe, [pixels], [prompt], step=levels[0], seed=options.seed)
        Console(highlight=False).print(share_table(found, pipe.expert_block))
    if drawing is not None:
        with console.status("compiling and drawing"), explaining_full_memory(TO_LOAD):
            picture = drawn(pipe, pixels, prompt, drawing, levels, options)
            drawing.file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(drawing.file)
        where = "all blocks" if drawing.block is None else f"block {drawing.block}"
        at = f"noise level {', '.join(map(str, levels))}"
        console.print(f"wrote {drawing.file}: {where}, {at}{'' if options.image else f' of {steps}, while generating'}")


def asked_levels(checkpoint: Checkpoint, options: Any, steps: int | None) -> tuple[int, ...]:
    """Returns the noise levels that are looked at. Raises ValueError for one that there is not.

    Args:
      steps: of the run that generates a picture; None: an image is noised.
    """
    if steps is None:
        levels = (options.at_steps or LEVELS) if options.by == "levels" else [options.step]
        return tuple(checkpoint.step(level) for level in levels)
    checkpoint.schedule.sigmas(steps)
    checkpoint.schedule.check_sampler(options.sampler)
    scaled = [max(1, round(level * steps / LEVELS[-1])) for level in LEVELS]
    levels = (options.at_steps or scaled) if options.by == "levels" else [options.step]
    for level in levels:
        if level is not None and not 1 <= level <= steps:
            raise ValueError(f"noise level {level} is not of this run: expected 1 (the last step) to {steps}")
    return tuple(dict.fromkeys(mask_step(level, checkpoint.step(), steps) for level in levels))


def drawn(
    pipe: Pipeline, pixels: np.ndarray | None, prompt: str, drawing: Drawing, levels: Sequence[int], options: Any
) -> Image.Image:
    """The picture that `--words`, `--words WORD --by ...`, `--pads` or `--components` asks for.

    Args:
      pixels: of the image; None: the run that generates a picture of the prompt is looked at.
    """
    blocks = range(pipe.transformer.depth) if drawing.block is None else [drawing.block]
    run: RunOptions = {"seed": options.seed, "sampler": options.sampler}
    run["guidance"] = GUIDANCE if options.guidance is None else options.guidance
    run["steps"] = LEVELS[-1] if options.steps is None else options.steps
    if options.components:
        if pixels is None:
            found = generating_records(pipe, prompt, ComponentsReader(), blocks=blocks, levels=levels, **run)
            scores = np.stack([np.asarray(each.scores)[0] for each in found.levels[levels[0]].values()])
            return component_sheet(scores, found.grid)
        images, texts = noised_squares(pipe, [pixels], step=levels[0], seed=options.seed), pipe.encode_prompts([prompt])
        with pipe.settings():
            components = block_components(pipe.transformer, images, texts)
        return component_sheet(np.asarray(components.scores)[0], images.grid(pipe.transformer.config.patch_size))
    request = {"heads": HEADS_KEPT, "directions": BOTH_WAYS}.get(options.by, HEADS_AVERAGED)
    if pixels is None:
        seen = seen_while_generating(pipe, prompt, request, blocks=blocks, levels=levels, **run)
    else:
        seen = seen_in_image(pipe, pixels, prompt, request, blocks=blocks, levels=levels, seed=options.seed)
    depth, word = pipe.transformer.depth, drawing.words[0] if drawing.words else ""
    if options.by == "blocks":
        return draw_maps(seen.picture, by_blocks(seen.records, word))
    if options.by == "directions":
        return draw_maps(seen.picture, both_directions(seen.records, word), columns=min(4, 2 * depth))
    if options.by == "levels":
        return draw_maps(seen.picture, by_levels(seen.levels, word), columns=depth)
    (record,) = seen.records.values()
    if options.by == "heads":
        return draw_maps(seen.picture, by_heads(record, word))
    return draw_maps(seen.picture, of_pads(record)) if options.pads else draw_words(seen.picture, record, drawing.words)


def said(checkpoint: Checkpoint, options: Any) -> str:
    """The prompt. Raises ValueError when there is none, two, or class names that do not fit in one."""
    if bool(options.classes) == (options.prompt is not None):
        found = "both" if options.classes else "neither"
        raise ValueError(f"say what is in the image, CLASS... or --prompt: found {found}")
    return only_prompt(checkpoint, options.classes) if options.prompt is None else options.prompt


def only_prompt(checkpoint: Checkpoint, names: list[str]) -> str:
    """The prompt of class names. Raises ValueError for names that do not fit in one."""
    prompt, *more = class_prompts(checkpoint.tokenizers, names).prompts
    if more:
        raise ValueError(f"{len(names)} class names need {1 + len(more)} prompts; expected what fits in one")
    return prompt


class Drawing(NamedTuple):
    """What is to be drawn: a PNG file, words of the prompt, and the block whose attention it shows; None: all."""

    file: Path
    words: list[str]
    block: int | None


def asked_drawing(checkpoint: Checkpoint, prompt: str, options: Any) -> Drawing:
    """By default of each class or each word of the prompt.

    Raises ValueError for words that the prompt lacks, a block that there is not, and a file that cannot be written.
    """
    length = checkpoint.tokenizers.clip_l.model_max_length
    text = text_columns(checkpoint.tokenizers, prompt, (("clip", length),), (0, length))
    words = options.words or options.classes or text.spoken
    if options.words is not None and not words:
        raise ValueError(f"the prompt {prompt!r} has no word to draw")
    for word in words if options.words is not None else ():
        text.named(word)
    file = picture_file(options.out, options.image or "prompt", options.overwrite)
    return Drawing(file, words, None if _of_all_blocks(options) else checkpoint.block(options.block))


def _of_all_blocks(options: Any) -> bool:
    return options.components or options.by in ALL_BLOCKS


def picture_file(out: str | None, image: str, overwrite: bool) -> Path:
    """Where the picture of words goes. Raises ValueError for a name that is no PNG's, the image's own or taken."""
    file = Path("runs") / "analyze" / f"{Path(image).stem}-{datetime.now():%Y%m%d-%H%M%S}.png"
    if out is not None:
        file = Path(out).expanduser()
        if file.suffix.lower() != ".png":
            raise ValueError(f"--out is {out}: expected a name that ends in .png")
        if file.resolve() == Path(image).expanduser().resolve():
            raise ValueError(f"--out {out} is the image itself: name another file")
        if file.is_dir() or (file.exists() and not overwrite):
            raise ValueError(f"--out {out} is there already: name another file, or give --overwrite")
    check_writable(file.parent)
    return file


def share_table(found: PromptStatistics, named: int | None) -> Table:
    """Of each block: its share of attention on text, and the norms of its values. Of the first prompt."""
    shares = found.text_shares[0]
    means = shares.mean(axis=1)
    on_words = found.word_shares[0]
    of_image = found.value_norms("image")[0]
    ratios = [found.value_norms(*groups)[0] / of_image for groups in (found.text_groups, found.prompt_groups)]
    table = Table("block", "on text", "heads", "on words", "norm of text", "of words", "", box=None)
    for column in table.columns[:-1]:
        column.justify = "right"
    star = lambda values, block: "*" if np.isfinite(values).any() and block == np.nanargmax(values) else " "
    for block, heads in enumerate(shares):
        table.add_row(
            str(block),
            f"{100 * means[block]:.1f} %{star(means, block)}",
            f"{100 * heads.min():.0f}..{100 * heads.max():.0f} %",
            f"{100 * on_words[block]:.1f} %{star(on_words, block)}" if np.isfinite(on_words[block]) else "-",
            *(f"{each[block]:.2f}{star(each, block)}" if np.isfinite(each[block]) else "-" for each in ratios),
            "the checkpoint's expert" if block == named else "",
            style="bold" if block == means.argmax() else "",
        )
    table.caption = (
        f"* the largest. Attention without any preference would put {100 * found.uniform_text_shares[0]:.1f} % on "
        "text. Words: the prompt's tokens without start, end and padding. Norms: of the tokens' values, as a multiple "
        "of the image tokens'."
    )
    return table
