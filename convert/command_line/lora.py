"""The command `seg4diff convert lora SRC DST`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from seg4diff_jax.convert.lora.adapters import WRITTEN, convert_lora, read_lora
from seg4diff_jax.convert.lora.formats import in_short


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add(
        "source",
        type=str,
        help="file or directory of adapters of any tool that docs/convert.md lists, or a training run",
    )
    add("target", type=str, help=".safetensors file (native, diffusers), .pth file (release) or directory (peft)")
    add("--to", choices=list(WRITTEN), help="format of the target; default: diffusers of ours, ours of all others")
    add(
        "--checkpoint",
        type=str,
        help="of a training run, instead of what it left at its end: last, best (by held-out mIoU) or a step",
    )
    add("--alpha", type=float, help="for files that do not say; default: 16 (release), the rank (others)")
    add("--adapters-only", action="store_true", help="leave out tensors that are no adapters, such as a mask head")
    add("--overwrite", action="store_true", help="replace the target")


def run(options: Any) -> None:
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    ours = options.checkpoint or read_lora(options.source, alpha=options.alpha).format == "native"
    to = options.to or ("diffusers" if ours else "native")
    read = convert_lora(
        options.source,
        options.target,
        to=to,
        alpha=options.alpha,
        adapters_only=options.adapters_only,
        overwrite=options.overwrite,
        checkpoint=options.checkpoint,
    )
    config = read.config
    say(f"read {options.source} ({read.format}): rank {config.rank}, alpha {config.alpha:g}, ", end="", markup=False)
    say(f"{len(read.adapters)} adapters: {', '.join(config.targets)} in blocks {_ranges(config.blocks)}")
    if read.others:
        what = "left out" if options.adapters_only else "kept"
        names = in_short(read.others)
        say(f"{what} {len(read.others)} tensors that are no adapters of the transformer: {names}", markup=False)
    if read.left_out:
        say(f"left out: {', '.join(read.left_out)}", markup=False)
    say(f"wrote {options.target} ({to})", markup=False)


def _ranges(blocks: tuple[int, ...] | None) -> str:
    """Returns block numbers as text, as in 0..9, 12."""
    runs: list[list[int]] = []
    for block in blocks or ():
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
