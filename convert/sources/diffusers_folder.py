"""Opens a checkpoint in diffusers' layout: `model_index.json` and one folder per component."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from seg4diff_jax.convert.components import COMPONENTS, tokenizers_of
from seg4diff_jax.convert.errors import CheckpointError, raise_all
from seg4diff_jax.convert.families import SD3
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.readers import Source, TorchComponent
from seg4diff_jax.convert.sources.index import check_index, is_inside, named_components, read_scheduler
from seg4diff_jax.convert.sources.quantised import refuse_quantization_config
from seg4diff_jax.convert.sources.safetensors_stream import TensorInfo, read_header
from seg4diff_jax.convert.sources.scaled_fp8 import with_scales
from seg4diff_jax.convert.sources.stored_tensor import StoredTensor
from seg4diff_jax.convert.sources.weight_files import read_weights
from seg4diff_jax.quoting import quoted

OF_TRANSFORMERS = "model"
"""Stem of transformers' weight files."""
SHARD = r"-\d{5}-of-\d{5}"


def open_diffusers(
    directory: Path, variant: str | None, origin: str | None = None, components: Collection[str] | None = None
) -> Source:
    """Opens a directory in diffusers' layout.

    Args:
      origin: the place that a download comes from; components that were not fetched may then be absent. Default: none.
      components: the components that will be read. Others may be absent although the index names them: many copies lack
        T5's folder. Default: all that the index names.
    """
    index = read_json(directory / "model_index.json", "it marks a diffusers checkpoint")
    check_index(index, str(directory / "model_index.json"))
    present = [name for name in named_components(index) if (directory / name).is_dir()]
    absent = [name for name in named_components(index) if name not in present]
    if components is not None:
        absent = [name for name in absent if name in components]
    if absent and origin is None:
        raise CheckpointError(f"{directory}: model_index.json names {', '.join(absent)}, which it has no folder for")
    configs = {name: _of_text(read_json(directory / name / "config.json")) for name in present}

    return Source(
        origin or str(directory),
        configs,
        lambda name: _component(name, directory / name, configs[name], variant),
        {name: directory / name for name in tokenizers_of(present) if (directory / name).is_dir()},
        _scheduler(directory, index),
        index,
    )


def _of_text(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the text tower's part of a whole CLIP's configuration, as transformers does; returns others unchanged."""
    text = config.get("text_config")
    return text if config.get("model_type") == "clip" and isinstance(text, dict) else config


def component_in(folder: Path) -> str | None:
    """Returns the component that `save_pretrained` wrote into a folder, by the folder's `config.json`, or None."""
    if not (folder / "config.json").is_file():
        return None
    kind = read_json(folder / "config.json").get("_class_name")
    return next((name for name, each in COMPONENTS.items() if each.published == ("diffusers", kind)), None)


def open_component_folder(folder: Path, variant: str | None) -> Source:
    """Opens one component alone, in the folder that `save_pretrained` wrote."""
    name, config = str(component_in(folder)), read_json(folder / "config.json")
    return Source(str(folder), {name: config}, lambda name: _component(name, folder, config, variant))


def _component(name: str, folder: Path, config: dict[str, Any], variant: str | None) -> TorchComponent:
    refuse_quantization_config(config, str(folder / "config.json"))
    return TorchComponent(name, config, "diffusers", _read_folder(folder, name, variant), str(folder))


def _scheduler(directory: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the directory's scheduler configuration; SD3's if the index names no scheduler and there is no file."""
    named = index.get("scheduler", [None])[0] is not None
    if named or os.path.lexists(directory / "scheduler" / "scheduler_config.json"):
        return read_scheduler(directory, "model_index.json names a scheduler")
    return dict(SD3.scheduler)


def weight_files(names: Collection[str], stem: str, variant: str | None) -> list[str]:
    """Chooses the files of a component that hold its weights: one whole file, or shards and their index.

    An index is not read here. A whole file and shards can lie side by side, as after saving twice. Then the library
    that loads the component decides: transformers 5.24 takes the whole file, diffusers 0.42 the shards if their index
    is there.

    Args:
      names: the folder's files.
      stem: `model` (transformers') or `diffusion_pytorch_model` (diffusers').
      variant: the preferred variant. If it is absent, the plain files are taken, or else the only variant there is.

    Returns the index, if there is one, and the names of all shards; or the one whole file; or nothing if none fits.
    """
    kinds = _variants(names, stem)
    choice = next((key for key in (variant, None) if key in kinds), None)
    if choice not in kinds and len(kinds) == 1:
        choice = next(iter(kinds))
    files = kinds.get(choice, [])
    whole = [name for name in files if name.endswith(".safetensors") and not re.search(SHARD, name)]
    index = [name for name in files if name.endswith(".json")]
    if whole and (stem == OF_TRANSFORMERS or not index):
        return whole
    return [*index, *(name for name in files if re.search(SHARD, name))]


def _variants(names: Collection[str], stem: str) -> dict[str | None, list[str]]:
    """Returns a component's weight files by variant; plain files are under None."""
    kinds: dict[str | None, list[str]] = {}
    for name in sorted(names):
        for pattern in (
            rf"{stem}(?:\.(?P<v>[\w-]+?))?(?:{SHARD})?\.safetensors",
            rf"{stem}{SHARD}\.(?P<v>\w+)\.safetensors",  # diffusers' former names
            rf"{stem}\.safetensors\.index(?:\.(?P<v>\w+))?\.json",
            rf"{stem}\.safetensors\.(?P<v>\w+)\.index\.json",
        ):
            if found := re.fullmatch(pattern, name):
                kinds.setdefault(found["v"], []).append(name)
                break
    return kinds


def _read_folder(folder: Path, name: str, variant: str | None) -> dict[str, StoredTensor]:
    present = [path.name for path in folder.iterdir()]
    stem = COMPONENTS[name].weights
    files = weight_files(present, stem, variant)
    if not files:
        raise no_weights(str(folder), present, stem)
    if not files[0].endswith(".json"):
        if len(files) > 1:
            raise CheckpointError(f"{folder}: {', '.join(files)} are shards without their index, a .index.json file")
        return read_weights(folder / files[0])
    return with_scales(_read_shards(folder / files[0]), str(folder))


def no_weights(where: str, present: Collection[str], stem: str) -> CheckpointError:
    """Returns the error about a component for which no weight file can be chosen."""
    if pickled := sorted(file for file in present if file.endswith((".bin", ".pt", ".pth", ".ckpt"))):
        return CheckpointError(
            f"{where}: {', '.join(pickled)}: pickled weights can run code and are not read; save the model with "
            "save_pretrained(..., safe_serialization=True) first"
        )
    if several := [each for each in _variants(present, stem) if each is not None]:
        which = " and ".join(several)
        return CheckpointError(f"{where}: weights of variants {which}, and no plain ones: choose by --variant")
    return CheckpointError(
        f"{where}: no weights: expected {stem}.safetensors or {stem}.safetensors.index.json, possibly with a "
        f"variant as in {stem}.fp16.safetensors; found {', '.join(sorted(present)) or 'nothing'}"
    )


def weight_map_of(index: Path) -> dict[str, str]:
    """Returns the file beside the index that holds each tensor. Raises CheckpointError for a damaged index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: expected a weight_map from tensors to files")
    beside = lambda shard: isinstance(shard, str) and is_inside(shard) and Path(shard).name == shard
    if wrong := [name for name, shard in weight_map.items() if not beside(shard)]:
        raise CheckpointError(
            f"{index}: weight_map: expected for each tensor the name of a file in this folder, found "
            f"{quoted(weight_map[wrong[0]])} for {quoted(wrong[0])}"
        )
    return weight_map


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    weight_map = weight_map_of(index)
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if not path.is_file():
            problems.append(f"{path}: missing shard, named by {index.name}")
            continue
        try:
            header = read_header(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        announced = {name for name, file in weight_map.items() if file == shard}
        problems += [f"{path}: {name} is missing, {index.name} says it is here" for name in announced - header.keys()]
        problems += [f"{path}: {name} is surplus, {index.name} does not name it" for name in header.keys() - announced]
        tensors |= header
    raise_all(problems, f"{index.parent}")
    return tensors
