"""The command `seg4diff convert verify SRC`: runs PyTorch and JAX side by side on a user's own weights."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from seg4diff_jax.convert.components import COMPONENTS
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.verify.comparison import BOUNDS, FACTOR, LABEL_FACTOR, Comparison
from seg4diff_jax.convert.verify.report import Report, verify

DESCRIPTION = """Run PyTorch (diffusers, transformers) and JAX side by side on the same weights and the same seeded
inputs, and print how far apart they are: latents and pixels, prompt embeddings, both streams and the image-to-text maps
of every transformer block, the velocity, and the masks. The exit status is 0 only if every row is within its bound. In
float32 the largest absolute error is at most {relative:.0e} of the reference's largest absolute value, and masks are
equal wherever one class leads by more than the scores are apart. In bfloat16, where what rounding costs depends on the
weights, PyTorch's own error is the measure: PyTorch runs in float32 as well, and the RMS distance of ours from it is at
most {factor:g} times that of PyTorch in bfloat16 plus {rounding:.1e} ({labels:g} times plus {label_rounding:.0%} of the
pixels for masks). With --float64 a float32 row out of its bound passes if the same holds of the
distances from PyTorch in float64."""
WIDTH = 200
"""Columns of the console without a terminal: more than the table needs."""


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    half, full = BOUNDS["bfloat16"], BOUNDS["float32"]
    parser.description = DESCRIPTION.format(
        relative=full.relative,
        factor=FACTOR,
        rounding=half.rounding,
        labels=LABEL_FACTOR,
        label_rounding=half.label_rounding,
    )
    add("source", type=str, help="diffusers directory, single .safetensors file, converted directory, or Hub id")
    add("--against", type=str, help="the original, which PyTorch reads, if the source is a converted directory")
    add(
        "--size",
        type=int,
        help="side of the test picture in pixels; default: 256, or the most that the checkpoint takes",
    )
    add("--dtype", choices=list(BOUNDS), default="float32", help="what both compute in")
    add("--float64", action="store_true", help="run PyTorch in float64 as well, and judge by both distances from it")
    add("--components", nargs="+", choices=list(COMPONENTS), metavar="NAME", help="default: all; Hub: all but T5")
    add("--tokenizers", type=str, help="directory with tokenizer, tokenizer_2 [, tokenizer_3]; default: random ids")
    add("--text-encoders", type=str, help="where text encoders come from that the source lacks; see docs/convert.md")
    add("--variant", type=str, help="of the weight files, as in fp16; '' for those of none")
    add("--json", type=str, metavar="FILE", help="write the rows to a file as well")


def run(options: Any) -> None:
    """Compares both frameworks and prints the table. Raises CheckpointError after that if a row is out of bounds."""
    if options.json:
        _check_writable(Path(options.json))
    console = Console(stderr=True)
    with console.status("reading") as status:
        report = verify(
            options.source,
            options.against,
            size=options.size,
            dtype=options.dtype,
            float64=options.float64,
            components=options.components,
            tokenizers=Path(options.tokenizers) if options.tokenizers else None,
            variant=options.variant,
            text_encoders=options.text_encoders,
            on_progress=status.update,
        )
    out = Console()
    (out if out.is_terminal else Console(width=WIDTH)).print(table(options.source, report))
    if options.json:
        Path(options.json).write_text(to_json(options, report))
    if report.failures:
        raise CheckpointError(
            f"{len(report.failures)} of {len(report.rows)} rows are out of bounds; the first is "
            f"{report.failures[0].what!r}"
            + ("" if options.float64 else "; --float64 tells whether PyTorch's own rounding is as large")
        )


def _check_writable(file: Path) -> None:
    """Raises CheckpointError unless the file can be written. Creates no file, and changes no existing one."""
    there = file.exists()
    try:
        with file.open("a"):
            pass
        if not there:
            file.unlink()
    except OSError as error:
        raise CheckpointError(f"--json {file}: cannot be written ({error.strerror})") from None


def table(source: str, report: Report) -> Table:
    title, *notes = report.notes
    printed = Table(title=f"{source}\n{title}", caption="\n".join(notes))
    printed.add_column("what", no_wrap=True)
    for name in ("shape", "max abs", "relative", "cosine"):
        printed.add_column(name, justify="right", no_wrap=True)
    printed.add_column("bound", no_wrap=True)
    printed.add_column("result", no_wrap=True)
    for row in report.rows:
        result = "[green]pass[/]" if row.passed else "[bold red]FAIL[/]"
        printed.add_row(row.what, "x".join(map(str, row.shape)), *_numbers(row), row.bound, result)
    return printed


def _numbers(row: Comparison) -> tuple[str, str, str]:
    if row.equal is not None:
        return "", f"{100 * row.equal:.3f} %", ""
    return f"{row.max_error:.2e}", f"{row.relative_error:.2e}", f"{row.cosine:.8f}"


def to_json(options: Any, report: Report) -> str:
    """Returns the report as JSON; numbers that are not finite become null."""
    rows = [{name: _finite(value) for name, value in asdict(row).items()} for row in report.rows]
    about = {name: getattr(options, name) for name in ("source", "against", "text_encoders", "dtype")}
    return json.dumps(
        {**about, "size": report.size, "notes": report.notes, "passed": not report.failures, "rows": rows}, indent=2
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
