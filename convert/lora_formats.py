"""The files that adapters come in: PEFT's directory, diffusers' file, the Seg4Diff release's checkpoint, and ours.

native     one safetensors file under our names; rank, alpha, targets and blocks in its header, as JSON
diffusers  one safetensors file, as StableDiffusion3Pipeline.save_lora_weights writes it
peft       a directory with adapter_model.safetensors and adapter_config.json
release    a detectron2 checkpoint (`lora_weights.pth`); it says neither rank nor alpha: the rank is that of the
           tensors, alpha is 16
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from convert.errors import CheckpointError
from convert.files import read_json
from convert.layout import contiguous
from convert.lora_names import DIFFUSERS, NATIVE, PEFT, RELEASE, Factor, Naming, config_of, pair, refuse
from convert.safetensors_stream import read_header, read_tensor
from convert.torch_pickle import load_pickle, save_pickle, to_numpy
from seg4diff_jax.models.lora import Adapter, LoRAConfig

Format = Literal["native", "diffusers", "peft", "release"]
RELEASE_ALPHA = 16.0
NATIVE_FORMAT, NATIVE_VERSION = "seg4diff-jax lora", 1
NATIVE_KEY = "lora"
NATIVE_FILE = "adapters.safetensors"
"""Of a directory: what a training run exports."""
EXPORT, CHECKPOINTS = "export", "checkpoints"
"""Where in a training run's directory."""
DIFFUSERS_KEY = "lora_adapter_metadata"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHER_ADAPTERS = (
    "use_rslora",
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of PEFT's that make an adapter compute something else than alpha / rank (x A) B."""


@dataclass(frozen=True)
class LoRACheckpoint:
    """A file of adapters.

    Attributes:
      config: with the blocks that have adapters spelt out.
      adapters: by per-layer name, in our layout and the file's dtypes.
      others: tensors of the file that are no adapters, under their own names, such as the mask head of the release.
      format: what it was read from.
      left_out: parts of the source that are not read, such as the state of an optimizer.
    """

    config: LoRAConfig
    adapters: dict[str, Adapter]
    others: dict[str, np.ndarray] = field(default_factory=dict)
    format: Format = "native"
    left_out: tuple[str, ...] = ()


def read_native(path: Path, alpha: float | None) -> LoRACheckpoint:
    tensors, metadata = _read_file(path), read_metadata(path)
    try:
        stated = json.loads(metadata[NATIVE_KEY])
        version, others = stated["version"], stated["others"]
        config = LoRAConfig(stated["rank"], float(stated["alpha"]), tuple(stated["targets"]), tuple(stated["blocks"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its header does not describe its adapters ({error!r}); convert again") from None
    if version != NATIVE_VERSION:
        raise CheckpointError(f"{path}: expected version {NATIVE_VERSION}, found {version}; convert the original again")
    problems = [f"missing: {name}" for name in others if name not in tensors]
    factors, rest = NATIVE.read({name: tensor for name, tensor in tensors.items() if name not in others})
    adapters = _whole(path, factors, rest, config.rank, problems)
    found = config_of(adapters, config.rank, _alpha(path, config.alpha, alpha, config.alpha))
    if (found.targets, found.blocks) != (config.targets, config.blocks):
        raise CheckpointError(
            f"{path}: its header names {config.targets} in blocks {config.blocks}, its tensors are of {found.targets} "
            f"in blocks {found.blocks}; convert the original again"
        )
    return LoRACheckpoint(found, adapters, {name: tensors[name] for name in others})


def write_native(path: Path, checkpoint: LoRACheckpoint) -> None:
    config = checkpoint.config
    stated = {
        "version": NATIVE_VERSION,
        "rank": config.rank,
        "alpha": config.alpha,
        "targets": config.targets,
        "blocks": config.blocks,
        "others": list(checkpoint.others),
    }
    tensors = NATIVE.write(checkpoint.adapters) | checkpoint.others
    _write_file(path, tensors, {"format": NATIVE_FORMAT, NATIVE_KEY: json.dumps(stated)})


def read_diffusers(path: Path, alpha: float | None) -> LoRACheckpoint:
    tensors, metadata = _read_file(path), read_metadata(path)
    alphas = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".alpha")}
    factors, rest = DIFFUSERS.read(tensors)
    modules = {re.sub(r"\.lora_[AB]\.weight$", "", factor.key) for factor in factors}
    problems = [f"{name}: an alpha of no adapter" for name in alphas if name.removesuffix(".alpha") not in modules]
    values = sorted({float(value) for value in alphas.values() if value.size == 1})
    if alphas and (len(values) != 1 or len(alphas) < len(modules) or any(a.size != 1 for a in alphas.values())):
        problems.append(f"alphas: expected one number, the same for each of {len(modules)} layers, found {values}")
    rank, stated = None, values[0] if values else None
    if DIFFUSERS_KEY in metadata:
        prefix = "transformer."
        config = {key.removeprefix(prefix): value for key, value in _json(path, metadata[DIFFUSERS_KEY]).items()}
        rank, config_alpha = _peft_settings(path, config, factors, problems)
        if stated not in (None, config_alpha):
            problems.append(f"alpha is {config_alpha} in the header, {stated} in the tensors")
        stated = config_alpha
    adapters = _whole(path, factors, rest, rank, problems)
    rank = next(iter(adapters.values())).a.shape[1]
    config = config_of(adapters, rank, _alpha(path, stated, alpha, float(rank)))  # as diffusers does
    return LoRACheckpoint(config, adapters, format="diffusers")


def write_diffusers(path: Path, checkpoint: LoRACheckpoint) -> None:
    """Alpha goes into the header: diffusers 0.42 refuses an SD3 file that has it among its tensors."""
    _refuse_others(checkpoint, "diffusers")
    settings = {f"transformer.{key}": value for key, value in _peft_config(checkpoint).items()}
    metadata = {"format": "pt", DIFFUSERS_KEY: json.dumps(settings)}
    _write_file(path, DIFFUSERS.write(checkpoint.adapters), metadata)


def read_peft(folder: Path, alpha: float | None) -> LoRACheckpoint:
    path = folder / PEFT_WEIGHTS
    settings = read_json(folder / PEFT_CONFIG, "it holds rank and alpha of PEFT's adapters")
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise CheckpointError(f"{folder}: adapter_model.bin is pickled: save it with safe_serialization=True first")
    tensors = _read_file(path)
    factors, rest = PEFT.read(tensors)
    problems: list[str] = []
    rank, stated = _peft_settings(folder / PEFT_CONFIG, settings, factors, problems)
    adapters = _whole(path, factors, rest, rank, problems)
    return LoRACheckpoint(config_of(adapters, rank, _alpha(folder, stated, alpha, stated)), adapters, format="peft")


def write_peft(folder: Path, checkpoint: LoRACheckpoint) -> None:
    _refuse_others(checkpoint, "peft")
    (folder / PEFT_CONFIG).write_text(json.dumps(_peft_config(checkpoint), indent=2))
    _write_file(folder / PEFT_WEIGHTS, PEFT.write(checkpoint.adapters), {"format": "pt"})


def read_release(path: Path, alpha: float | None) -> LoRACheckpoint:
    named, left_out = _find_model(path, load_pickle(path))
    arrays = {name: to_numpy(value) for name, value in named.items()}
    problems = [
        f"{name}: expected a tensor, found a {type(named[name]).__name__}" for name in arrays if arrays[name] is None
    ]
    tensors = {name: array for name, array in arrays.items() if array is not None}
    mine = {name: tensor for name, tensor in tensors.items() if ".lora_" in name or "transformer_blocks." in name}
    prefixes = {name.split("transformer_blocks.")[0] for name in mine if ".lora_" in name}
    canonical = RELEASE.template.split("transformer_blocks.")[0]
    prefix = prefixes.pop() if len(prefixes) == 1 else canonical  # wrappers put `module.` and the like before it
    others = {n: t for n, t in tensors.items() if n not in mine and not (prefix and n.startswith(prefix))}
    factors, _ = Naming(RELEASE.template.replace(canonical, prefix, 1)).read(mine)
    understood = {factor.key for factor in factors} | others.keys()
    rest = [name for name in tensors if name not in understood]
    adapters = _whole(path, factors, rest, None, problems)
    rank = next(iter(adapters.values())).a.shape[1]
    config = config_of(adapters, rank, _alpha(path, None, alpha, RELEASE_ALPHA))
    return LoRACheckpoint(config, adapters, others, "release", left_out)


def write_release(path: Path, checkpoint: LoRACheckpoint) -> None:
    if checkpoint.config.alpha != RELEASE_ALPHA:
        raise CheckpointError(
            f"the release's format does not hold alpha, its code takes {RELEASE_ALPHA:g}, these adapters have "
            f"{checkpoint.config.alpha:g}: choose another format"
        )
    save_pickle(path, RELEASE.write(checkpoint.adapters) | checkpoint.others)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header."""
    with safe_open(path, "numpy") as file:
        return file.metadata() or {}


def _read_file(path: Path) -> dict[str, np.ndarray]:
    return {name: read_tensor(info) for name, info in read_header(path).items()}


def _write_file(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    save_file({name: contiguous(array) for name, array in tensors.items()}, path, metadata)


def _whole(
    path: Path, factors: list[Factor], rest: list[str], rank: int | None, problems: list[str]
) -> dict[str, Adapter]:
    problems = problems + [f"surplus: {name} is not a tensor of an adapter of SD3's transformer" for name in rest]
    adapters = pair(factors, rank, problems)
    refuse(path, problems)
    return adapters


def _alpha(path: Path, stated: float | None, asked: float | None, default: float) -> float:
    if stated is not None and asked not in (None, stated):
        raise CheckpointError(f"{path}: it says alpha is {stated:g}; --alpha {asked:g} is for files that do not say")
    return float(stated if stated is not None else default if asked is None else asked)


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        return dict(found)
    except (ValueError, TypeError):
        raise CheckpointError(f"{path}: {DIFFUSERS_KEY} in its header is not a JSON object") from None


def _peft_config(checkpoint: LoRACheckpoint) -> dict[str, Any]:
    """PEFT's settings; layers are named in full, so that no other of a like name is adapted too."""
    alpha = checkpoint.config.alpha
    return {
        "peft_type": "LORA",
        "r": checkpoint.config.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [_module(layer) for layer in checkpoint.adapters],
    }


def _module(layer: str) -> str:
    block = layer.split(".")[1]
    return f"transformer_blocks.{block}.{PEFT.layer(layer)}"


def _peft_settings(
    path: Path, settings: dict[str, Any], factors: Collection[Factor], problems: list[str]
) -> tuple[int, float]:
    """Rank and alpha; what else the settings ask for, or of layers that are not there, is added to `problems`."""
    kind, bias = settings.get("peft_type", "LORA"), settings.get("bias", "none")
    problems += [f"{path}: peft_type is {kind!r}; 'LORA' is implemented"] if kind != "LORA" else []
    problems += [f"{path}: bias is {bias!r}; 'none' is implemented"] if bias != "none" else []
    problems += [
        f"{path}: {key} is {settings[key]!r}; it is not implemented" for key in OTHER_ADAPTERS if settings.get(key)
    ]
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise CheckpointError(f"{path}: expected numbers as r and lora_alpha, found {rank!r} and {alpha!r}")
    problems += _unmatched(path, settings.get("target_modules"), {_module(factor.layer) for factor in factors})
    return rank, float(alpha)


def _unmatched(path: Path, targets: Any, modules: Collection[str]) -> Iterator[str]:
    """Targets without a layer and layers without a target; PEFT's targets are a pattern or a list of endings."""
    if isinstance(targets, str) and targets != "all-linear":
        yield from (f"{path}: {m} is not among target_modules" for m in modules if not re.fullmatch(targets, m))
    elif isinstance(targets, list):
        fits = lambda module, target: module == target or module.endswith(f".{target}")
        for target in targets:
            if not any(fits(module, target) for module in modules):
                yield f"{path}: there is no adapter of {target}, one of target_modules"
        for module in modules:
            if not any(fits(module, target) for target in targets):
                yield f"{path}: {module} is not among target_modules"


def _refuse_others(checkpoint: LoRACheckpoint, to: Format) -> None:
    if checkpoint.others:
        raise CheckpointError(
            f"the {to} format holds adapters alone, and there are other tensors: {', '.join(checkpoint.others)}; "
            "choose the native format, or leave them out with --adapters-only"
        )


def _find_model(path: Path, loaded: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The named tensors of a checkpoint, however it wraps them, and what else lies beside them."""
    layers = [("", loaded)]
    if isinstance(loaded, Mapping):
        layers += [(str(key), value) for key, value in loaded.items()]
    found = [(k, v) for k, v in layers if isinstance(v, Mapping) and any(".lora_" in str(name) for name in v)]
    if not found:
        keys = ", ".join(map(str, list(loaded)[:8])) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise CheckpointError(
            f"{path}: no adapters: expected a `model` with names like {RELEASE.template}, found {keys}"
        )
    key, model = found[0]
    beside = () if key == "" else tuple(str(name) for name in loaded if name != key)
    return {str(name): value for name, value in model.items()}, beside
