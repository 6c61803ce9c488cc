"""Converts whole checkpoints to our format, layer by layer, and back to diffusers' layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seg4diff_jax.convert.components import COMPONENTS, parse_config, part_of, tokenizers_of
from seg4diff_jax.convert.errors import CheckpointError, raise_all
from seg4diff_jax.convert.layout import contiguous
from seg4diff_jax.convert.names import Assignment, NameTableError, Shape, assign_back
from seg4diff_jax.convert.progress import OnBytes, counter
from seg4diff_jax.convert.readers import ComponentReader, Layout, Source, TorchComponent, nbytes
from seg4diff_jax.convert.sources import native
from seg4diff_jax.convert.sources.open import open_source, with_published_tokenizers
from seg4diff_jax.convert.sources.safetensors_stream import write_safetensors
from seg4diff_jax.convert.staging import check_target, staged_directory
from seg4diff_jax.convert.tokenizers import check_tokenizers

Format = Literal["native", "diffusers"]
KINDS = {"scheduler", *COMPONENTS, *tokenizers_of(list(COMPONENTS))}
MARKERS: dict[Format, str] = {"native": native.MANIFEST, "diffusers": "model_index.json"}


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    to: Format = "native",
    dtype: Any = None,
    components: Sequence[str] | None = None,
    tokenizers: Path | None = None,
    variant: str | None = None,
    text_encoders: str | Path | None = None,
    overwrite: bool = False,
    on_progress: OnBytes = lambda done, total: None,
) -> list[str]:
    """Converts a checkpoint. Everything is checked before anything is written; `target` appears complete or not at all.

    Args:
      source: whatever `open_source` opens.
      target: a directory that does not exist.
      to: our format, or diffusers' layout, which StableDiffusion3Pipeline.from_pretrained loads.
      dtype: dtype of every parameter; default: each tensor's own.
      components, tokenizers, variant, text_encoders: see `open_source`.
      overwrite: replace a `target` that is a checkpoint of the same format.
      on_progress: receives the number of bytes written so far, and the number in all.

    Returns the names of the components that `target` has.

    Raises:
      CheckpointError: the source is at fault (the message lists the problems of all components), or `target` exists
        already, overlaps the source or does not fit on the disk.
    """
    target = Path(target)
    check_target(target, overwrite=overwrite, marker=MARKERS[to])
    opened = open_source(
        source, components=components, tokenizers=tokenizers, variant=variant, text_encoders=text_encoders
    )
    for each in (source, *([text_encoders] if text_encoders is not None else [])):
        _check_apart(each, target)
    opened = with_published_tokenizers(opened)
    check_tokenizers(opened)
    readers = _open_all(opened)
    _ = opened.expert_block  # the manifest, written last, needs it: a wrong one is refused before anything is written
    cast = None if dtype is None else np.dtype(dtype)
    total = sum(nbytes(reader, cast) for reader in readers)
    _check_space(target, total)
    report = counter(on_progress, total)
    with staged_directory(target) as work:
        if to == "native":
            _write_native(work, opened, readers, cast, report)
        else:
            _write_diffusers(work, opened, readers, cast, report)
    return list(opened.configs)


def _check_space(target: Path, needed: int) -> None:
    folder = next(path for path in target.absolute().parents if path.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise CheckpointError(f"{target} needs {needed / 1e6:,.0f} MB, {folder} has {free / 1e6:,.0f} MB of free space")


def _check_apart(source: str | Path, target: Path) -> None:
    here, there = Path(source).expanduser().resolve(), target.resolve()
    if here.exists() and (here == there or here in there.parents or there in here.parents):
        raise CheckpointError(f"{target} and its source {source} lie one inside the other: choose another name")


def _open_all(source: Source) -> list[ComponentReader]:
    """Opens and checks every component. Raises a CheckpointError that lists the problems of all of them."""
    readers, problems = [], []
    for name in source.configs:
        try:
            reader = source.component(name)
            reader.check()
            readers.append(replace(reader, once=True) if isinstance(reader, TorchComponent) else reader)
        except CheckpointError as error:
            problems.append(str(error))
    raise_all(problems, f"{source.origin}: {len(problems)} of its components are damaged")
    return readers


def _cast(parameters: Iterable[tuple[str, np.ndarray]], dtype: np.dtype | None) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, contiguous(array, dtype)) for name, array in parameters)


def _write_native(
    work: Path, source: Source, readers: list[ComponentReader], dtype: np.dtype | None, report: Callable[[int], None]
) -> None:
    records = {
        reader.name: native.write_component(
            work / reader.name,
            reader.config,
            part_of(reader.name, reader.config),
            _cast(reader.parameters(), dtype),
            report,
        )
        for reader in readers
    }
    native.write_manifest(work, source, records)


def _write_diffusers(
    work: Path, source: Source, readers: list[ComponentReader], dtype: np.dtype | None, report: Callable[[int], None]
) -> None:
    for reader in readers:
        folder = work / reader.name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(reader.config, indent=2))
        _write_torch(folder / f"{COMPONENTS[reader.name].weights}.safetensors", reader, dtype, report)
    source.copy_tokenizers_and_scheduler(work)
    index = {**source.family.model_index, **source.model_index}
    index |= {name: [None, None] for name in KINDS if not (work / name).is_dir()}
    (work / "model_index.json").write_text(json.dumps(index, indent=2))


def _write_torch(path: Path, reader: ComponentReader, dtype: np.dtype | None, report: Callable[[int], None]) -> None:
    """Writes one component under diffusers' names, part by part. Wide dtypes come first, so that all lie aligned."""
    layout = {name: (shape, dtype or own) for name, (shape, own) in reader.layout().items()}
    rules = COMPONENTS[reader.name].rules["diffusers"](parse_config(reader.name, reader.config))
    try:
        rows = assign_back(rules, layout)
    except NameTableError as error:
        raise CheckpointError(f"{reader.name}: {error}") from None
    place = {name: number for number, name in enumerate(layout)}
    rows.sort(key=lambda row: max(place[target] for target in row.targets))
    rows.sort(key=lambda row: -layout[row.targets[0]][1].itemsize)
    write_safetensors(
        path,
        {row.source: (_torch_shape(row, layout), layout[row.targets[0]][1]) for row in rows},
        _torch_tensors(rows, layout, reader, dtype, report),
    )


def _torch_shape(row: Assignment, layout: Layout) -> Shape:
    return row.transform.to_torch([np.broadcast_to(np.float32(0), layout[name][0]) for name in row.targets]).shape


def _torch_tensors(
    rows: list[Assignment],
    layout: Layout,
    reader: ComponentReader,
    dtype: np.dtype | None,
    report: Callable[[int], None],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors in the order of `rows`.

    Parameters arrive in the layout's order. They wait in memory until their row is complete.
    """
    waiting: dict[str, np.ndarray] = {}
    for _, group in groupby(rows, key=lambda row: layout[row.targets[0]][1].itemsize):
        group = list(group)
        arriving = reader.parameters({target for row in group for target in row.targets})
        for row in group:
            while not all(target in waiting for target in row.targets):
                name, array = next(arriving)
                waiting[name] = array
            tensor = contiguous(row.transform.to_torch([waiting.pop(target) for target in row.targets]), dtype)
            yield row.source, tensor
            report(tensor.nbytes)
