"""Reads low-rank adapters of any format, converts them to another, and puts them on a loaded model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.lora import formats
from seg4diff_jax.convert.lora.files import PEFT_CONFIG, Format, Opened, find_adapters, open_file
from seg4diff_jax.convert.lora.formats import LoRACheckpoint
from seg4diff_jax.convert.lora.layers import config_of, gaps, pair, refuse
from seg4diff_jax.convert.lora.names import native_names, parse_native
from seg4diff_jax.convert.staging import check_target, staged_directory
from seg4diff_jax.models.lora import Adapter, LoRAConfig, apply_lora
from seg4diff_jax.models.sd3.model import MMDiT


class FileFormat(NamedTuple):
    """A file format of adapters.

    `write` is None for a format that is only read. `suffix` is the file's suffix; None for a directory.
    """

    read: Callable[[Opened, float | None], LoRACheckpoint]
    write: Callable[[Path, LoRACheckpoint], None] | None = None
    suffix: str | None = None


FORMATS: dict[Format, FileFormat] = {
    "native": FileFormat(formats.read_native, formats.write_native, ".safetensors"),
    "diffusers": FileFormat(formats.read_named, formats.write_diffusers, ".safetensors"),
    "peft": FileFormat(formats.read_peft, formats.write_peft),
    "release": FileFormat(formats.read_release, formats.write_release, ".pth"),
    "kohya": FileFormat(formats.read_named),
    "onetrainer": FileFormat(formats.read_named),
    "lycoris": FileFormat(formats.read_named),
    "comfyui": FileFormat(formats.read_named),
}
WRITTEN = tuple(name for name, form in FORMATS.items() if form.write)


def load_lora(
    path: str | Path, *, alpha: float | None = None, adapters_only: bool = False
) -> tuple[LoRAConfig, dict[str, Adapter]]:
    """Returns the adapters of a file in any format, for `seg4diff_jax.models.lora.apply_lora`.

    Args:
      path: a file, or a directory that PEFT, diffusers or a training run wrote.
      alpha: alpha for files that do not state it. Default: 16 for the Seg4Diff release's, the rank for diffusers'.
      adapters_only: accept a file that holds other tensors too, such as the mask head of MAGNET's training, and leave
        them out.

    Returns:
      the configuration, and (A [in, rank], B [rank, out]) as NumPy arrays by per-layer name.

    Raises:
      CheckpointError: the file is absent, damaged, or of no known format; or tensors are unknown, incomplete, of a
        wrong rank or shape, or (see `adapters_only`) no adapters. The message lists these tensors.
    """
    checkpoint = read_lora(path, alpha=alpha)
    if checkpoint.others and not adapters_only:
        raise CheckpointError(
            f"{path}: tensors that are no adapters of the transformer and would go unused: "
            f"{formats.in_short(checkpoint.others)}; "
            f"leave them out with `seg4diff convert lora {path} DST --adapters-only`"
        )
    return checkpoint.config, checkpoint.adapters


def attach_lora(
    mmdit: MMDiT,
    path: str | Path,
    *,
    alpha: float | None = None,
    adapters_only: bool = False,
    drop_absent_blocks: bool = False,
) -> MMDiT:
    """Returns the model with a file's adapters, unmerged.

    Args:
      mmdit: a model without adapters; it is not changed.
      alpha, adapters_only: see `load_lora`.
      drop_absent_blocks: leave out the adapters of blocks that the model does not hold.

    Raises:
      CheckpointError: as `load_lora`; or adapters do not fit the model: the message lists all of these.
    """
    config, adapters = load_lora(path, alpha=alpha, adapters_only=adapters_only)
    try:
        return apply_lora(mmdit, config, adapters, drop_absent_blocks=drop_absent_blocks, partial=True)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def save_lora(
    path: str | Path, config: LoRAConfig, adapters: Mapping[str, tuple[Any, Any]], *, overwrite: bool = False
) -> None:
    """Writes adapters, as `lora_state` returns them, to a file in our format.

    Raises CheckpointError when they are not whole or not of the configuration's rank, or the file exists.
    """
    arrays = {name: Adapter(np.asarray(a), np.asarray(b)) for name, (a, b) in adapters.items()}
    parsed = parse_native(native_names(arrays))
    problems = [f"surplus: {name}" for name in parsed.rest]
    whole = pair(parsed.factors, lambda layer: config.rank, problems)
    refuse(path, problems + [f"missing: an adapter of {layer}" for layer in gaps(whole)])
    checkpoint = LoRACheckpoint(config_of(whole, config.rank, config.alpha), whole)
    write_lora(checkpoint, path, to="native", overwrite=overwrite)


def convert_lora(
    source: str | Path,
    target: str | Path,
    *,
    to: Format = "native",
    alpha: float | None = None,
    adapters_only: bool = False,
    overwrite: bool = False,
    checkpoint: str | None = None,
) -> LoRACheckpoint:
    """Converts adapters, and returns what was read. No bit of a number is changed, unless `unite` has to.

    Args:
      source: see `load_lora`.
      target: a file that ends in .safetensors (native, diffusers) or .pth (release), or a directory (peft).
      adapters_only: leave out the source's other tensors. Otherwise native and release keep them. diffusers and peft
        cannot hold them, and an error is raised.
      overwrite: replace `target`.
      checkpoint: a checkpoint of a training run, to be read instead of the run's export; see
        `convert.lora.run.read_run`.

    Raises:
      CheckpointError: as `load_lora` and `read_run`; or `target` exists already, has a wrong suffix, or cannot hold
        what the source holds.
    """
    if checkpoint is None:
        read = read_lora(source, alpha=alpha)
    else:
        from seg4diff_jax.convert.lora.run import read_run  # imports Orbax, which nothing else here needs

        if alpha is not None or adapters_only:
            raise CheckpointError("a checkpoint says its alpha and gives nothing but adapters: leave the options out")
        read = read_run(source, checkpoint)
    if Path(source).resolve() == Path(target).resolve():
        raise CheckpointError(f"{target} is the source: choose another name")
    kept = replace(read, others={}) if adapters_only else read
    write_lora(kept, target, to=to, overwrite=overwrite)
    return read


def read_lora(path: str | Path, *, alpha: float | None = None) -> LoRACheckpoint:
    """Reads all of a file of adapters. The content shows its format. Arguments and errors are as for `load_lora`."""
    opened = open_file(find_adapters(Path(path).expanduser()))
    return FORMATS[opened.format].read(opened, alpha)


def write_lora(checkpoint: LoRACheckpoint, target: str | Path, *, to: Format, overwrite: bool = False) -> None:
    """Writes `target`, complete or not at all. Raises CheckpointError as `convert_lora` does."""
    target, form = Path(target).expanduser(), FORMATS[to]
    if form.write is None:
        raise CheckpointError(f"adapters are not written as {to}: choose {', '.join(WRITTEN)}")
    if form.suffix is None:
        check_target(target, overwrite=overwrite, marker=PEFT_CONFIG)
        with staged_directory(target) as work:
            form.write(work, checkpoint)
        return
    if target.suffix != form.suffix:
        raise CheckpointError(f"{target}: a file in the {to} format must end in {form.suffix}")
    if target.is_dir() or (target.exists() and not overwrite):
        raise CheckpointError(f"{target} exists: choose another name" + ("" if target.is_dir() else " or --overwrite"))
    with _staged_file(target) as work:
        form.write(work, checkpoint)


@contextmanager
def _staged_file(target: Path) -> Iterator[Path]:
    """Yields a path beside `target` for the file that takes its place when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield work
        with work.open("rb") as file:
            os.fsync(file.fileno())
        work.replace(target)
    finally:
        work.unlink(missing_ok=True)
