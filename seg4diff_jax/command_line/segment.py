"""`seg4diff segment IMAGE CLASS... --model MODEL`: segments an image into named classes."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jsonargparse import ArgumentParser
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seg4diff_jax.checkpoints import DTYPES, Checkpoint, open
from seg4diff_jax.class_names import OneClassWarning, one_class, with_commas
from seg4diff_jax.class_priors import read_class_prior
from seg4diff_jax.command_line.memory import TO_LOAD, explaining_full_memory
from seg4diff_jax.compilation import CompilationClock
from seg4diff_jax.flow import LARGEST_SEED, check_seed
from seg4diff_jax.images import Resize, read_image
from seg4diff_jax.interrupted_runs import DIRECTORY
from seg4diff_jax.parallel import named_devices
from seg4diff_jax.pipeline import Pipeline, Segmentation
from seg4diff_jax.reporting.drawings import draw_stages
from seg4diff_jax.reporting.overlays import percent
from seg4diff_jax.reporting.segmentation_files import FILES, STAGES, write_segmentation
from seg4diff_jax.segmentation.mask_options import MASKS_WITH_PRIOR, PAPERS_MASKS, REFINED_MASKS
from seg4diff_jax.terminal import counted_bytes, stderr_console
from seg4diff_jax.text import class_prompts
from seg4diff_jax.versions import versions


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("image", type=str, help="image file")
    add("classes", type=str, nargs="+", metavar="CLASS", help='class names, such as: cat "traffic light" sky')
    add("--refine", action="store_true", help="balance classes, refine masks, follow edges: docs/better_masks.md")
    add(
        "--prior",
        type=str,
        metavar="FILE",
        help="with --refine: what seg4diff class-prior wrote; divides each class's map by what its words draw anywhere",
    )
    add(
        "--concepts",
        action="store_true",
        help="with --refine: the image does not read the class words, which read it: docs/better_masks.md",
    )
    add("--explain", action="store_true", help="with --refine: draw what each of its steps changes, as stages.png")
    result_arguments(parser)
    model_arguments(parser)


def result_arguments(parser: ArgumentParser) -> None:
    """Adds the options for the results' directory, and for how the image is segmented."""
    add: Any = parser.add_argument
    add("--out", type=str, help="directory for the results; default: runs/segment/<image name>-<time>")
    add("--overwrite", action="store_true", help="replace files of an earlier run in --out")
    add("--block", type=int, help="transformer block to read; default: the checkpoint's own expert block")
    add(
        "--step", type=int, help="noise level: 1 (nearly clean) to 28 (pure noise); default: the checkpoint's own, or 8"
    )
    add("--seed", type=int, default=0, help=f"of the noise: 0 to {LARGEST_SEED}")
    add("--size", type=str, metavar="HxW", help="height x width that the model sees, as in 768x1024")
    add("--resize", choices=list(get_args(Resize)), default="aspect", help="how the image comes to that size")


def model_arguments(parser: ArgumentParser) -> None:
    """Adds the options that name the model and say how to load it."""
    add: Any = parser.add_argument
    add("--model", type=str, required=True, help="miniature, a directory, a .safetensors or .gguf file, or a Hub id")
    add("--lora", type=str, metavar="FILE_OR_DIR", help="adapters for the transformer, of any format of convert lora")
    add("--dtype", choices=DTYPES, help="of parameters and computation; default: float32 on a CPU, else bfloat16")
    add("--t5", action="store_true", help="load T5 too; default: as in the paper, without")
    add("--text-encoders", type=str, metavar="MODEL", help="where to take them from: some single files have none")
    add(
        "--tokenizers",
        type=str,
        metavar="DIR",
        help="with tokenizer and tokenizer_2, for single files; default: the Hub's",
    )
    add("--variant", type=str, help="of a diffusers directory's weight files, as in fp16")


def run(options: Any) -> None:
    if options.explain and not options.refine:
        raise ValueError("--explain shows what --refine does, which is not given")
    for name in ("prior", "concepts"):
        if getattr(options, name) and not options.refine:
            raise ValueError(f"--{name} is for --refine, which is not given")
    masks, prior = REFINED_MASKS if options.refine else PAPERS_MASKS, None
    if options.prior is not None:
        masks, prior = MASKS_WITH_PRIOR, read_class_prior(options.prior)
        prior.of(options.classes)  # a class that was not measured is refused before weights are read
    if options.concepts:
        masks = replace(masks, reading="concepts")

    def segment(pipe: Pipeline, pixels: np.ndarray, **how: Any) -> Segmentation:
        ask = partial(pipe.segment, pixels, options.classes, **how)
        found = ask(masks=masks, prior=prior)
        if options.explain:
            *sooner, (last, _) = masks.stages()
            stages = [(name, ask(masks=each, prior=prior if each.prior else None)) for name, each in sooner]
            shown.append(draw_stages(pixels, [*stages, (last, found)]))
        return found

    shown: list[Image.Image] = []
    resolved = {"masks": asdict(masks)} if options.refine else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OneClassWarning)  # the same is said before the model is loaded
        out = segment_to_files(options, options.classes, segment, resolved)
    for sheet in shown:
        sheet.save(out / STAGES)
        stderr_console().print(f"wrote {out / STAGES}: what each step of --refine changes")


def segment_to_files(
    options: Any,
    classes: Sequence[str] | None,
    segment: Callable[..., Segmentation],
    resolved: Mapping[str, Any] | None = None,
) -> Path:
    """Loads a model, segments an image and writes the results. Returns their directory.

    Args:
      classes: class names, checked before the weights are read; None: there are none.
      segment: takes the pipeline, the pixels and the options of `result_arguments` by name.
      resolved: resolved values of options, for the record.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it warns that PyTorch is missing
    console = stderr_console()
    # Names, block, noise level, size, seed and class names are checked before the weights are read, which takes time.
    out = output_directory(options.out, options.image, options.overwrite)
    size = parse_size(options.size)
    check_seed(options.seed)
    pixels = read_image(options.image)
    checkpoint = open_named(options)
    block, step = checkpoint.block(options.block), checkpoint.step(options.step)
    checkpoint.size(size)
    if classes is not None:
        class_prompts(checkpoint.tokenizers, classes)
        for remark in filter(None, (with_commas(classes), one_class(classes))):
            console.print(f"warning: {remark}")

    pipe, dtype, loading = load_shown(console, checkpoint, options, blocks=block + 1)

    how = {"block": block, "step": step, "seed": options.seed, "size": size, "resize": options.resize}
    remedy = explaining_full_memory("choose a smaller --size, or --dtype bfloat16")
    with console.status("compiling and segmenting"), CompilationClock() as compilation, remedy:
        start = time.perf_counter()
        segmentation = segment(pipe, pixels, **how)
        total = time.perf_counter() - start
    seconds = {"loading": loading, "compiling": compilation.seconds, "running": total - compilation.seconds}
    seen = size_seen(pipe, segmentation)
    console.print(
        f"segmented {pixels.shape[0]} x {pixels.shape[1]} pixels, seen as {seen[0]} x {seen[1]}, in {total:.1f} s: "
        f"compiling {seconds['compiling']:.1f} s, running {seconds['running']:.1f} s"
    )

    record = {
        **options.as_dict(),
        **(resolved or {}),
        "out": str(out),
        "block": block,
        "step": step,
        "dtype": dtype,
        "size": list(seen),
        "sigma": checkpoint.schedule.sigma_at(step),
        "input_size": list(pixels.shape[:2]),
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "versions": versions(),
    }
    with console.status("drawing"):
        shares = write_segmentation(out, pixels, segmentation, record)
    Console(highlight=False).print(area_table(shares))
    console.print(f"wrote {out}: {', '.join(FILES)}")
    return out


def open_named(options: Any) -> Checkpoint:
    """Opens the checkpoint that the options of `model_arguments` name."""
    return open(
        options.model,
        t5=options.t5,
        text_encoders=options.text_encoders,
        tokenizers=options.tokenizers,
        variant=options.variant,
    )


def load_shown(
    console: Console, checkpoint: Checkpoint, options: Any, blocks: int | None = None
) -> tuple[Pipeline, str, float]:
    """Loads the pipeline. Returns it, the name of its dtype, and the seconds that loading took."""
    with counted_bytes(console, f"loading {options.model}") as progress, explaining_full_memory(TO_LOAD):
        start = time.perf_counter()
        pipe = checkpoint.load(dtype=options.dtype, blocks=blocks, lora=options.lora, on_progress=progress)
        seconds = time.perf_counter() - start
    held, last = pipe.transformer.depth - 1, pipe.transformer.config.num_layers - 1
    dtype = str(jnp.dtype(pipe.transformer.context_embed.dtype))
    adapters = f", adapters of {options.lora}" if options.lora else ""
    where = f"{dtype} on {named_devices(1)}"
    console.print(f"loaded {options.model} in {seconds:.1f} s: blocks 0..{held} of 0..{last}, {where}{adapters}")
    return pipe, dtype, seconds


def output_directory(out: str | None, image: str, overwrite: bool, option: str = "--out") -> Path:
    """Returns the directory for the results. Raises ValueError if it holds other files or cannot be written.

    `option` is the one that names the directory.
    """
    if out is None:
        directory = Path("runs") / "segment" / f"{Path(image).stem}-{datetime.now():%Y%m%d-%H%M%S}"
        check_writable(directory)
        return directory
    directory = Path(out).expanduser()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{option} {out} is a file: expected a directory")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise ValueError(
            f"{option} {out} is not empty: name another, or give --overwrite to replace an earlier run's files"
        )
    check_writable(directory)
    return directory


def resumable_directory(options: Any, default: str, complete: str) -> Path:
    """Returns the directory of a run that `--resume` goes on with after an interruption.

    Args:
      options: with out, overwrite and resume.
      default: the directory without --out.
      complete: name of a file that a finished run has.

    Raises ValueError if the directory holds other files or cannot be written, or --resume does not fit what it holds.
    """
    out = Path(options.out or default).expanduser()
    interrupted = (out / DIRECTORY).is_dir()
    if options.resume and options.out is None:
        raise ValueError("--resume goes on with the run in --out: name its directory")
    if options.resume and (out / complete).is_file() and not interrupted:
        raise ValueError(f"--out {out} is complete: there is nothing to --resume; give --overwrite to begin anew")
    if options.resume and interrupted:
        check_writable(out)
        return out
    if interrupted and not options.overwrite:
        raise ValueError(f"--out {out} holds an interrupted run: give --resume to go on, or --overwrite to begin anew")
    return output_directory(str(out), "", options.overwrite)


def check_writable(directory: Path) -> None:
    """Raises ValueError unless files can be written in `directory`, or in its first existing parent."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"--out {directory}: cannot write to {existing} ({error.strerror}): name a directory that can be written"
        ) from None


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Returns height and width from text such as 768x1024. Raises ValueError for other text."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)\s*[x×,]\s*(\d+)", text.strip())
    if not found:
        raise ValueError(f"--size is {text!r}: expected height x width in pixels, as in 768x1024")
    return int(found[1]), int(found[2])


def size_seen(pipe: Pipeline, segmentation: Segmentation) -> tuple[int, int]:
    """Returns height and width, in pixels, of the image that the transformer saw."""
    rows, columns = segmentation.scores.shape[1:]
    return rows * pipe.view.multiple, columns * pipe.view.multiple


def area_table(shares: dict[str, float]) -> Table:
    table = Table("class", "area", box=None)
    table.columns[1].justify = "right"
    for name, share in shares.items():
        table.add_row(Text(name), percent(share))
    return table
