"""Opens one safetensors or GGUF file: a transformer and, as Stability publishes them, VAE and text encoders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seg4diff_jax.convert.components import COMPONENTS, parse_config
from seg4diff_jax.convert.errors import CheckpointError, listed
from seg4diff_jax.convert.families import Naming
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.foreign_names import OF_MODELS, OF_OWN, recognise, recognise_prefix
from seg4diff_jax.convert.inferred_configs import infer_config
from seg4diff_jax.convert.readers import Source, TorchComponent
from seg4diff_jax.convert.sources.diffusers_folder import SHARD
from seg4diff_jax.convert.sources.quantised import refuse_quantization_config
from seg4diff_jax.convert.sources.stored_tensor import StoredTensor
from seg4diff_jax.convert.sources.weight_files import read_weights

REDUNDANT = re.compile(r"text_encoders\.(clip_l|clip_g|t5xxl)\.(logit_scale|transformer\.logit_scale)")
"""Matches tensors outside every component, which are left from the text encoders' own training."""
BLOCKS = ("joint_blocks.", "transformer_blocks.")
"""Beginnings of the names of a transformer's blocks."""
NAMINGS: dict[str, Naming] = {
    "transformer_blocks.": "diffusers",
    "encoder.down_blocks.": "diffusers",
    "enc.blk.": "gguf",
}
"""Beginnings of names that show another naming than Stability's."""


def open_single_file(path: Path) -> Source:
    if re.search(SHARD, path.name):
        raise CheckpointError(f"{path} is one of several shards: give the folder that holds them all and their index")
    tensors: dict[str, dict[str, StoredTensor]] = {}
    weights = read_weights(path)
    prefixes = _prefixes(weights)
    surplus = []
    for name, tensor in weights.items():
        owner = next((key for key, prefix in prefixes.items() if name.startswith(prefix)), None)
        if owner is not None:
            tensors.setdefault(owner, {})[name.removeprefix(prefixes[owner])] = tensor
        elif not REDUNDANT.fullmatch(name):
            surplus.append(name)
    # A file with SD3's blocks is not of another family, whatever its surplus tensors are called.
    sound = any(name.startswith(BLOCKS) for name in tensors.get("transformer", ()))
    known = recognise(surplus, OF_OWN if sound else OF_MODELS) or (None if tensors else recognise_prefix(surplus))
    if known:
        raise CheckpointError(f"{path}: {known}")
    if not tensors:
        raise CheckpointError(
            f"{path}: not an SD3 checkpoint: no tensor's name begins with "
            + ", ".join([*(component.prefix for component in COMPONENTS.values()), *BLOCKS])
            + (f"; it has {next(iter(weights))} and the like" if weights else "; it has none")
        )
    if surplus:
        listing = "\n  ".join(listed(surplus))
        raise CheckpointError(f"{path}: {len(surplus)} surplus tensors of no component:\n  {listing}")
    return of_tensors(
        str(path), {name: (path, prefixes[name], tensors[name]) for name in COMPONENTS if name in tensors}
    )


def _prefixes(names: Mapping[str, object]) -> dict[str, str]:
    """Returns the prefix of each component's tensors. A transformer that is alone in its file may have none."""
    prefixes = {name: component.prefix for name, component in COMPONENTS.items()}
    if any(name.startswith(BLOCKS) for name in names) and not any(
        name.startswith(tuple(prefixes.values())) for name in names
    ):
        return {"transformer": ""}
    return prefixes


def naming_of(names: Mapping[str, object]) -> Naming:
    """Returns the naming of a component's tensors, for files without a configuration."""
    for begin, naming in NAMINGS.items():
        if any(name.startswith(begin) for name in names):
            return naming
    return "stability"


def _config_beside(name: str, path: Path) -> dict[str, Any] | None:
    """Returns the configuration that `save_pretrained` wrote beside a component's file, or None.

    Such a configuration says more than shapes do.
    """
    file = path.with_name("config.json")
    if not file.is_file():
        return None
    config = read_json(file)
    if ("diffusers", config.get("_class_name")) != COMPONENTS[name].published:
        return None
    refuse_quantization_config(config, str(file))
    try:
        parse_config(name, config)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return config


def of_tensors(origin: str, found: Mapping[str, tuple[Path, str, Mapping[str, StoredTensor]]]) -> Source:
    """Returns the source of components that lie in files without configurations.

    Args:
      found: for each component its file, the prefix of the tensors' names there, and the tensors without that prefix.

    Raises CheckpointError when a configuration neither lies beside a component's file nor follows from its tensors.
    """
    namings: dict[str, Naming] = {name: naming_of(tensors) for name, (_, _, tensors) in found.items()}
    configs = {}
    for name, (path, prefix, tensors) in found.items():
        if (beside := _config_beside(name, path)) is not None:
            configs[name] = beside
            continue
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        try:
            configs[name] = infer_config(name, shapes, prefix, namings[name])
        except CheckpointError as error:
            known = recognise(prefix + key for key in tensors)
            raise CheckpointError(f"{path}: {known or error}") from None

    def component(name: str) -> TorchComponent:
        path, prefix, tensors = found[name]
        return TorchComponent(name, configs[name], namings[name], tensors, str(path), prefix)

    return Source(origin, configs, component)
