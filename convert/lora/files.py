"""Finds and opens files of adapters: the file that a path names, its tensors, and the format that their names show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np

from seg4diff_jax.convert.components import COMPONENTS
from seg4diff_jax.convert.errors import CheckpointError, listed
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.foreign_names import OF_ADAPTERS, recognise
from seg4diff_jax.convert.lora.layers import refuse
from seg4diff_jax.convert.lora.names import (
    DIFFUSERS,
    DOTTED_PREFIXES,
    FLAT_PREFIXES,
    STABILITY,
    TEXT_ENCODER,
    is_adapter,
)
from seg4diff_jax.convert.lora.peft import other_kind
from seg4diff_jax.convert.sources.hub import is_repository_id
from seg4diff_jax.convert.sources.safetensors_stream import read_annotated, read_tensor
from seg4diff_jax.convert.sources.torch_pickle import is_pickle, load_pickle, to_numpy

Format = Literal["native", "diffusers", "peft", "release", "kohya", "onetrainer", "lycoris", "comfyui"]
NATIVE_FILE = "adapters.safetensors"
"""Name of the file that a training run exports into a directory."""
EXPORT, CHECKPOINTS = "export", "checkpoints"
"""Folders of a training run's directory."""
NATIVE_FORMAT = "seg4diff-jax lora"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IN_DIRECTORIES = (NATIVE_FILE, PEFT_WEIGHTS, "adapter_model.bin", DIFFUSERS_FILE, "pytorch_lora_weights.bin")
"""Names by which a file of adapters is found in a directory."""
OF_CHECKPOINTS = (
    *(component.prefix for component in COMPONENTS.values()),
    *(f"{blocks}." for blocks in (DIFFUSERS, STABILITY)),
    "text_model.",
    "encoder.",
    "shared.",
)
"""Beginnings of names in files of whole components."""
PEFT_PREFIX, DIFFUSERS_PREFIX, RELEASE_PREFIX = "base_model.model.", "transformer.", "backbone.transformer."


def find_adapters(path: Path) -> Path:
    """Returns the file of adapters that a path names: the path itself, or a file in its directory."""
    if path.is_dir():
        found = [path / name for name in IN_DIRECTORIES if (path / name).is_file()]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(f"{path}: there are several files of adapters in it, {names}: name one of them")
        if found:
            return found[0]
        if (path / EXPORT).is_dir():
            return find_adapters(path / EXPORT)
        if (path / CHECKPOINTS).is_dir():
            raise CheckpointError(
                f"{path}: a training run that is not finished: take the adapters of one of its checkpoints with "
                f"`seg4diff convert lora {path} DST --checkpoint last`, or best"
            )
        alone = sorted(file for file in path.glob("[!.]*.safetensors") if file.is_file())
        if len(alone) == 1:
            return alone[0]
        if named := sorted(file.parent.name for file in path.glob(f"*/{PEFT_CONFIG}")):
            raise CheckpointError(f"{path}: adapters are in its folders {', '.join(listed(named))}: name one of them")
        names = f"{', '.join(IN_DIRECTORIES[:-1])} or {IN_DIRECTORIES[-1]}"
        raise CheckpointError(
            f"{path}: no adapters: expected {names}, or a single .safetensors file, in it; name a file that is called "
            "otherwise"
        )
    if not path.is_file():
        hint = f"; if it is on the Hub: hf download {path}" if is_repository_id(str(path)) else ""
        raise CheckpointError(f"{path}: no such file or directory{hint}")
    return path


class Opened(NamedTuple):
    """The content of a file, before adapters are made of it.

    Attributes:
      prefix: the prefix of the names of the transformer's layers.
      left_out: names of what a file of torch.save holds beside its tensors.
    """

    path: Path
    format: Format
    prefix: str
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]
    left_out: tuple[str, ...] = ()


def open_file(path: Path) -> Opened:
    """Reads all of a file and finds its format by its names. Raises CheckpointError for damage or an unknown format."""
    if is_pickle(path):
        tensors, left_out = _unpickled(path)
        metadata: dict[str, str] = {}
    else:
        stored, metadata = read_annotated(path)
        tensors, left_out = {name: read_tensor(info) for name, info in stored.items()}, ()
    if metadata.get("format") == NATIVE_FORMAT:
        return Opened(path, "native", "", tensors, metadata)
    form, prefix = _told_from(path, list(tensors))
    return Opened(path, form, prefix, tensors, metadata, left_out)


def _told_from(path: Path, names: Sequence[str]) -> tuple[Format, str]:
    """Returns the format that the names show, and the prefix of the names of layers."""
    adapters = [name for name in names if is_adapter(name) and not TEXT_ENCODER.match(name)]
    wrapped = {name.split(f"{DIFFUSERS}.")[0] for name in adapters if f"{RELEASE_PREFIX}{DIFFUSERS}." in name}
    if wrapped:
        return "release", min(wrapped, key=len)
    bare = {f"{DIFFUSERS}.": "diffusers", f"{STABILITY}.": "comfyui"}
    for prefix, form in (FLAT_PREFIXES | DOTTED_PREFIXES | bare).items():
        if any(name.startswith(prefix) for name in adapters):
            return cast(Format, form), "" if prefix in bare else prefix
    if any(map(is_adapter, names)) and (known := recognise(names, OF_ADAPTERS)):
        raise CheckpointError(f"{path}: {known}")
    if any(name.startswith(OF_CHECKPOINTS) for name in names) and not any(map(is_adapter, names)):
        raise CheckpointError(f"{path}: a model's own weights ({names[0]} ...), and no adapters: give it as the model")
    beside = path.parent / PEFT_CONFIG
    if beside.is_file() and (kind := other_kind(read_json(beside))):
        raise CheckpointError(f"{path}: {PEFT_CONFIG}: {kind}")
    layer = f"{DIFFUSERS}.0.attn.to_q.lora_A.weight"
    raise CheckpointError(
        f"{path}: no adapters of SD3's transformer: expected names like {DIFFUSERS_PREFIX}{layer}, "
        f"{PEFT_PREFIX}{layer} or another tool's that docs/convert.md lists, found {', '.join(names[:4]) or 'none'}"
    )


def _unpickled(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the named tensors of a file of torch.save, however it wraps them, and the names of all else."""
    loaded = load_pickle(path)
    places = [(None, loaded)] + (list(loaded.items()) if isinstance(loaded, Mapping) else [])
    holding = lambda value: isinstance(value, Mapping) and any(is_adapter(str(name)) for name in value)
    found = [(key, value) for key, value in places if holding(value)]
    if len(found) > 1:
        keys = " and ".join("the file itself" if key is None else str(key) for key, _ in found)
        raise CheckpointError(f"{path}: there are adapters in {keys}, and nothing says which to take: save one alone")
    key, named = found[0] if found else (None, None)
    if named is None:
        keys = ", ".join(map(str, list(loaded)[:8])) if isinstance(loaded, Mapping) else type(loaded).__name__
        layer = f"{RELEASE_PREFIX}{DIFFUSERS}.0.attn.to_q.lora_A.default.weight"
        raise CheckpointError(f"{path}: no adapters: expected a `model` with names like {layer}, found {keys}")
    arrays = {str(name): to_numpy(value) for name, value in named.items()}
    unread = [name for name, array in arrays.items() if array is None]
    kinds = {str(name): type(value).__name__ for name, value in named.items()}
    refuse(path, [f"{name}: expected a tensor, found a {kinds[name]}" for name in unread if is_adapter(name)])
    beside = [str(name) for name in loaded if name != key] if key is not None else []
    return {name: array for name, array in arrays.items() if array is not None}, (*beside, *unread)
