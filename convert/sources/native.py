"""The converted format: a folder per component with its `config.json` and its parameters, and one manifest.

    DST/manifest.json                     written last; names all other files and all parameters, with checksums
    DST/transformer/config.json           the configuration as published
    DST/transformer/params/base           an Orbax checkpoint of the parameters that belong to no layer
    DST/transformer/params/blocks.7       an Orbax checkpoint of one layer; a large one has more: `blocks.7-1`
    DST/tokenizer/...  DST/scheduler/scheduler_config.json

Writing holds a few layers in memory: some wait for the disk while the next is read. Reading holds one layer. Arrays lie
uncompressed, one per file: weights hardly compress, and compression would be slower than the disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from seg4diff_jax.convert.components import COMPONENTS, checked_block, component_shapes, parse_config, part_of
from seg4diff_jax.convert.configurations import check_depth
from seg4diff_jax.convert.errors import CheckpointError, raise_all, reason
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.layout import checksum, dtype_named, is_dtype, is_weight
from seg4diff_jax.convert.readers import Layout, Source
from seg4diff_jax.convert.sources.index import check_index, is_inside, read_scheduler
from seg4diff_jax.quoting import quoted

MANIFEST = "manifest.json"
FORMAT = "seg4diff-jax checkpoint"
VERSION = 1
WRITERS = 2
"""Parts that are written at a time: one is copied while another waits for the disk."""
LIBRARIES = ("jax", "flax", "orbax-checkpoint", "numpy", "ml_dtypes")

Parameters = dict[str, np.ndarray]
Records = dict[str, dict[str, dict[str, Any]]]
"""Shape, dtype and CRC-32 (of the bytes in C order) of each parameter, by part and by name."""


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False))


def write_component(
    folder: Path,
    config: Mapping[str, Any],
    part: Mapping[str, str],
    parameters: Iterable[tuple[str, np.ndarray]],
    written: Callable[[int], None],
) -> Records:
    """Writes a component's configuration and parameters; each part as soon as it is complete.

    Args:
      part: the part that each parameter belongs to.
      parameters: each parameter once, C-ordered, best part by part: incomplete parts wait in memory.
      written: receives the number of bytes of each part after it is written.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    left = Counter(part.values())
    waiting: dict[str, Parameters] = {name: {} for name in left}
    records: Records = {}
    saving: deque[Future[int]] = deque()
    # While some parts go to the disk the next is read and transposed.
    with ThreadPoolExecutor(WRITERS) as workers:
        for name, array in parameters:
            owner = part[name]
            waiting[owner][name] = array
            left[owner] -= 1
            if not left[owner]:
                if len(saving) == WRITERS:
                    written(saving.popleft().result())
                saving.append(workers.submit(_save, folder / "params" / owner, waiting, records))
        for future in saving:
            written(future.result())
    if waiting:
        raise ValueError(f"parameters of {', '.join(waiting)} were announced and not given")
    return {name: records[name] for name in dict.fromkeys(part.values())}


def _save(folder: Path, waiting: dict[str, Parameters], records: Records) -> int:
    """Moves the part called `folder.name` from memory to the disk. Returns the number of bytes."""
    arrays = waiting.pop(folder.name)
    records[folder.name] = {name: _record(array) for name, array in arrays.items()}
    size = sum(array.nbytes for array in arrays.values())
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(arrays))
    except ValueError as error:  # TensorStore's error for a full disk
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    return size


def _record(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype), "crc32": checksum(array)}


def write_manifest(directory: Path, source: Source, records: Mapping[str, Records]) -> None:
    """Copies tokenizers and scheduler, and finishes a directory whose components have been written."""
    files: dict[str, str] = {}
    source.copy_tokenizers_and_scheduler(directory)
    for path in sorted(directory.rglob("*")):
        if path.is_file() and "params" not in path.relative_to(directory).parts:
            files[path.relative_to(directory).as_posix()] = _digest(path)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "source": source.origin,
        "libraries": {name: version(name) for name in LIBRARIES},
        "expert_block": source.expert_block,
        "trained_size": source.trained_size if "transformer" in source.configs else None,
        "model_index": source.model_index,
        "files": files,
        "components": records,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_native(directory: Path) -> Source:
    """Opens a converted directory, after checking that it has every file of its manifest and no small file has changed.

    Raises a CheckpointError that lists the absent and the changed files.
    """
    manifest = read_json(directory / MANIFEST)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{directory / MANIFEST}: expected {FORMAT!r} version {VERSION}, found {quoted(manifest.get('format'))} "
            f"version {quoted(manifest.get('version'))}; convert the original again"
        )
    _check_manifest(directory / MANIFEST, manifest)
    problems = []
    for name, digest in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path}: missing file, named by {MANIFEST}")
        elif _digest(path) != digest:
            problems.append(f"{path}: changed since {MANIFEST} was written")
    components: dict[str, Records] = manifest["components"]
    for name, records in components.items():
        parts = (directory / name / "params" / part for part in records)
        problems += [f"{path}: missing part, named by {MANIFEST}" for path in parts if not path.is_dir()]
    raise_all(problems, f"{directory} is damaged; convert the original again")
    configs = {name: read_json(directory / name / "config.json") for name in components}
    if "transformer" in configs:
        layers = parse_config("transformer", configs["transformer"]).num_layers
        checked_block(manifest["expert_block"], layers, str(directory / MANIFEST))
    return Source(
        str(directory),
        configs,
        lambda name: NativeComponent(name, configs[name], directory / name / "params", components[name]),
        {path.split("/")[0]: directory / path.split("/")[0] for path in manifest["files"] if path.startswith("token")},
        read_scheduler(directory),
        manifest["model_index"],
        manifest["expert_block"],
    )


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raises a CheckpointError that lists the entries of a manifest that are absent or of a wrong type."""
    objects, again = ("files", "components", "model_index"), "it is damaged: convert the original again"
    problems = [f"{path}: missing {key}; {again}" for key in (*objects, "expert_block") if key not in manifest]
    problems += [
        f"{path}: expected an object as {key}, found a {type(manifest[key]).__name__}; {again}"
        for key in objects
        if not isinstance(manifest.get(key, {}), dict)
    ]
    if type(manifest.get("expert_block")) not in (int, NoneType):
        problems.append(f"{path}: expert_block is {quoted(manifest['expert_block'])}; expected an integer or null")
    for name, digest in files.items() if isinstance(files := manifest.get("files"), dict) else ():
        if not is_inside(name) or not isinstance(digest, str):
            problems.append(
                f"{path}: files: {quoted(name)}: expected a file of this directory and its SHA-256; {again}"
            )
    components = manifest.get("components")
    for name, parts in components.items() if isinstance(components, dict) else ():
        if name not in COMPONENTS:
            problems.append(f"{path}: no component is called {quoted(name)}; {again}")
        elif not (isinstance(parts, dict) and all(is_inside(part) and _is_part(parts[part]) for part in parts)):
            problems.append(f"{path}: {name}: expected each parameter's shape, dtype and crc32; {again}")
    raise_all(problems, f"{path} is damaged")
    check_index(manifest["model_index"], f"{path}: model_index")


def _is_part(records: Any) -> bool:
    return isinstance(records, dict) and all(
        isinstance(record, dict)
        and isinstance(shape := record.get("shape"), list)
        and all(type(side) is int and side > 0 for side in shape)
        and isinstance(dtype := record.get("dtype"), str)
        and is_dtype(dtype)
        and isinstance(crc := record.get("crc32"), str)
        and re.fullmatch("[0-9a-f]{8}", crc) is not None
        for record in records.values()
    )


@dataclass
class NativeComponent:
    """A component of a converted directory."""

    name: str
    config: dict[str, Any]
    folder: Path
    records: Records

    def layout(self) -> Layout:
        return {
            name: (tuple(record["shape"]), dtype_named(record["dtype"]))
            for part in self.records.values()
            for name, record in part.items()
        }

    def check(self) -> None:
        named = (name for part in self.records.values() for name in part)
        check_depth(self.name, parse_config(self.name, self.config), named, str(self.folder))
        expected, part = component_shapes(self.name, self.config), part_of(self.name, self.config)
        integers = [(name, dtype) for name, (_, dtype) in self.layout().items() if not is_weight(dtype)]
        found = {name: (tuple(r["shape"]), owner) for owner, rs in self.records.items() for name, r in rs.items()}
        raise_all(
            [
                f"{self.folder}: {name} is {dtype}: weights are floating-point numbers; convert the original again"
                for name, dtype in integers
            ]
            + [f"{self.folder}: missing parameter {name}" for name in expected if name not in found]
            + [f"{self.folder}: surplus parameter {name}" for name in found if name not in expected]
            + [
                f"{self.folder}: {name}: expected {list(shape)} in {part[name]}, found {list(found[name][0])} in "
                f"{found[name][1]}"
                for name, shape in expected.items()
                if name in found and found[name] != (shape, part[name])
            ],
            f"{self.folder} does not match the model",
        )

    def parameters(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        for part, records in self.records.items():
            if wanted is None or any(name in wanted for name in records):
                for name, array in self.read_part(part).items():
                    if wanted is None or name in wanted:
                        yield name, array

    def read_part(self, part: str) -> Parameters:
        """Returns one part's parameters. Raises CheckpointError when they are not the bytes that were written."""
        folder, records = self.folder / part, self.records[part]
        restore = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in records}
        try:
            with _checkpointer() as checkpointer:
                arrays = checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=restore))
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{folder}: cannot be read ({reason(error)}); convert the original again") from error
        changed = [name for name in records if name not in arrays or _record(arrays[name]) != records[name]]
        raise_all(
            [f"{folder}: {name} is not what was written (checksum); convert the original again" for name in changed],
            f"{folder} is damaged",
        )
        return arrays
