"""The command `seg4diff convert checkpoint SRC DST`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from seg4diff_jax.convert.checkpoint import MARKERS, convert_checkpoint
from seg4diff_jax.convert.components import COMPONENTS
from seg4diff_jax.terminal import counted_bytes


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add(
        "source",
        type=str,
        help="diffusers directory, single .safetensors or .gguf file, converted directory, or Hub id",
    )
    add("target", type=str, help="directory to write; it appears complete or not at all")
    add("--to", choices=list(MARKERS), default="native", help="format of the target")
    add("--dtype", choices=["float16", "bfloat16", "float32"], help="of the parameters; default: as they are")
    add("--components", nargs="+", choices=list(COMPONENTS), metavar="NAME", help="default: all; Hub: all but T5")
    add(
        "--text-encoders",
        type=str,
        help="where text encoders and VAE come from that the source lacks; see docs/convert.md",
    )
    add("--tokenizers", type=str, help="directory with tokenizer, tokenizer_2 [, tokenizer_3]: single files have none")
    add("--variant", type=str, help="of the weight files, as in fp16; '' for those of none")
    add("--overwrite", action="store_true", help="replace a target that is a checkpoint of the same format")


def run(options: Any) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns at each save that it does not write OCDBT
    console = Console(stderr=True)
    with counted_bytes(console, f"converting {options.source}") as progress:
        written = convert_checkpoint(
            options.source,
            options.target,
            to=options.to,
            dtype=options.dtype,
            components=options.components,
            tokenizers=Path(options.tokenizers) if options.tokenizers else None,
            variant=options.variant,
            text_encoders=options.text_encoders,
            overwrite=options.overwrite,
            on_progress=progress,
        )
    lacking = [name for name in COMPONENTS if name not in written]
    without = f"; it has no {', '.join(lacking)}" if lacking and options.components is None else ""
    console.print(f"wrote {options.target}: {', '.join(written)}{without}", soft_wrap=True)
