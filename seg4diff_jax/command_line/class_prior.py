"""`seg4diff class-prior DIR CLASSES --model MODEL --out FILE`: how much attention each class's words draw anywhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seg4diff_jax.class_priors import measure_class_prior, write_class_prior
from seg4diff_jax.command_line.memory import explaining_full_memory
from seg4diff_jax.command_line.segment import load_shown, model_arguments, open_named, parse_size
from seg4diff_jax.data.text_files import read_lines
from seg4diff_jax.flow import LARGEST_SEED, check_seed
from seg4diff_jax.quoting import counted
from seg4diff_jax.terminal import Bar, stderr_console
from seg4diff_jax.text import class_prompts


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("directory", type=str, metavar="DIR", help="pictures, of anything; labels are not needed")
    add("classes", type=str, metavar="CLASSES", help="file of all class names that will be asked for, one a line")
    add("--out", type=str, required=True, metavar="FILE", help="where to write the prior, as JSON")
    add("--overwrite", action="store_true", help="replace that file")
    add("--count", type=int, help="pictures to take, the first in order of names; default: all")
    add("--block", type=int, help="transformer block to read; default: the checkpoint's own expert block")
    add("--step", type=int, help="noise level: 1 to 28; default: the checkpoint's own, or 8")
    add("--seed", type=int, default=0, help=f"of the noise: 0 to {LARGEST_SEED}")
    add("--size", type=str, metavar="HxW", help="height x width that the model sees, as in 768x1024")
    add("--batch", type=int, default=8, help="pictures at a time")
    model_arguments(parser)


def run(options: Any) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it warns that PyTorch is missing
    console, out = stderr_console(), Path(options.out).expanduser()
    if out.is_dir() or (out.exists() and not options.overwrite):
        what = "a directory: name a file" if out.is_dir() else "there: name another, or give --overwrite"
        raise ValueError(f"--out {options.out} is {what}")
    for name, value in (("batch", options.batch), ("count", 1 if options.count is None else options.count)):
        if value < 1:
            raise ValueError(f"--{name} is {value}: expected at least 1")
    check_seed(options.seed)
    size, pictures = parse_size(options.size), pictures_of(Path(options.directory).expanduser())[: options.count]
    classes = read_lines(Path(options.classes).expanduser(), "class names, one a line")
    checkpoint = open_named(options)
    block, step = checkpoint.block(options.block), checkpoint.step(options.step)
    checkpoint.size(size)
    class_prompts(checkpoint.tokenizers, classes)  # names that cannot be prompts are refused before weights are read
    pipe, _, _ = load_shown(console, checkpoint, options, blocks=block + 1)
    how = {"block": block, "step": step, "seed": options.seed, "size": size, "batch_size": options.batch}
    remedy = explaining_full_memory("choose a smaller --batch, or --dtype bfloat16")
    with Bar(console, "measuring", len(pictures)) as bar, remedy:
        prior = measure_class_prior(pipe, pictures, classes, **how, on_progress=bar.update)
    write_class_prior(out, prior, options.model)
    Console(highlight=False).print(means_table(prior.means))
    console.print(f"wrote {out}: {len(classes)} classes, {counted(len(pictures), 'picture')}")


def pictures_of(directory: Path) -> list[str]:
    """Returns the files of a directory, in order of their names. Raises ValueError if there are none."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; expected one of pictures")
    files = sorted(str(path) for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise ValueError(f"{directory} holds no file: expected pictures")
    return files


def means_table(means: Mapping[str, float]) -> Table:
    table = Table("class", "draws, %", box=None)
    table.columns[1].justify = "right"
    for name, mean in sorted(means.items(), key=lambda each: -each[1]):
        table.add_row(Text(name), f"{100 * mean:.3f}")
    return table
