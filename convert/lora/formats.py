"""The file formats of adapters.

native      one safetensors file under our names; its header has rank, alpha, targets and blocks, as JSON
diffusers   one safetensors file, as StableDiffusion3Pipeline.save_lora_weights writes it, or with the names of
            SD3Transformer2DModel.save_lora_adapter, which lack `transformer.`
peft        a file with adapter_config.json beside it
release     a detectron2 checkpoint (`lora_weights.pth`); it says neither rank nor alpha: the rank is that of the
            tensors, alpha is 16
kohya, onetrainer, lycoris, comfyui   one file with these tools' names, and alpha among its tensors: only read

Except release and native, each may be safetensors or a file of torch.save.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from seg4diff_jax.convert.errors import CheckpointError, listed
from seg4diff_jax.convert.files import parse_object, read_json
from seg4diff_jax.convert.foreign_names import OF_ADAPTERS, recognise
from seg4diff_jax.convert.layout import contiguous
from seg4diff_jax.convert.lora.files import (
    DIFFUSERS_PREFIX,
    NATIVE_FORMAT,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    RELEASE_PREFIX,
    Format,
    Opened,
)
from seg4diff_jax.convert.lora.layers import config_of, gaps, is_alpha, most_common, pair, refuse, unite
from seg4diff_jax.convert.lora.names import (
    DIFFUSERS,
    TEXT_ENCODER,
    Parsed,
    is_adapter,
    native_names,
    parse,
    parse_native,
    surplus,
    torch_names,
)
from seg4diff_jax.convert.lora.peft import read_settings, settings_of
from seg4diff_jax.convert.sources.torch_pickle import save_pickle
from seg4diff_jax.models.lora import Adapter, LoRAConfig

RELEASE_ALPHA = 16.0
NATIVE_VERSION = 1
NATIVE_KEY, DIFFUSERS_KEY, KOHYA_KEY = "lora", "lora_adapter_metadata", "ss_network_alpha"
"""Names of a header's entries that hold settings."""


@dataclass(frozen=True)
class LoRACheckpoint:
    """A file of adapters.

    Attributes:
      config: the configuration, in which the blocks that have adapters are listed.
      adapters: adapters by per-layer name, in our layout and the file's dtypes. In some of the blocks a layer may have
        none.
      others: tensors of the file that are no adapters of the transformer, under their own names, such as the mask head
        of the release, or adapters of text encoders.
      format: the format that was read.
      left_out: parts of the source that are not read, such as the state of an optimizer.
    """

    config: LoRAConfig
    adapters: dict[str, Adapter]
    others: dict[str, np.ndarray] = field(default_factory=dict)
    format: Format = "native"
    left_out: tuple[str, ...] = ()


def read_native(opened: Opened, alpha: float | None) -> LoRACheckpoint:
    path, tensors = opened.path, opened.tensors
    stated = _stated(opened, NATIVE_KEY)
    if stated.get("version", NATIVE_VERSION) != NATIVE_VERSION:
        raise CheckpointError(
            f"{path}: expected version {NATIVE_VERSION}, found {stated['version']!r:.50}; convert the original again"
        )
    checks = NATIVE_STATED | {key: fits for key, fits in NATIVE_ADDED.items() if key in stated}
    wrong = [f"{key} is {stated.get(key)!r:.100}" for key, fits in checks.items() if not fits(stated.get(key))]
    if wrong:
        raise CheckpointError(f"{path}: its header does not describe its adapters ({', '.join(wrong)}); convert again")
    others, absent = stated["others"], stated.get("absent", [])
    problems = [f"missing: {name}" for name in others if name not in tensors]
    problems += [
        f"{name}: expected {shape}, found {list(tensors[name].shape)}"
        for name, shape in stated.get("shapes", {}).items()
        if name in tensors and list(tensors[name].shape) != shape
    ]
    parsed = parse_native({name: tensor for name, tensor in tensors.items() if name not in others})
    problems += [f"missing: an adapter of {layer}" for layer in gaps(_layers(parsed)) if layer not in absent]
    adapters = _whole(path, parsed, problems, lambda layer: stated["rank"])
    config = config_of(adapters, stated["rank"], stated["alpha"])
    _agreed(path, config.alpha, alpha)
    named = {"targets": list(config.targets), "blocks": list(config.blocks or ())}
    if different := [key for key, found in named.items() if stated[key] != found]:
        raise CheckpointError(
            f"{path}: its header names other {' and '.join(different)} than its tensors are of, "
            f"{', '.join(config.targets)} in blocks {named['blocks']}; convert the original again"
        )
    return LoRACheckpoint(config, adapters, {name: tensors[name] for name in others})


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


NATIVE_STATED: dict[str, Callable[[Any], bool]] = {
    "version": lambda value: value == NATIVE_VERSION,
    "rank": lambda value: type(value) is int,
    "alpha": is_alpha,
    "targets": _is_list_of(str),
    "blocks": _is_list_of(int),
    "others": _is_list_of(str),
}
NATIVE_ADDED: dict[str, Callable[[Any], bool]] = {
    "absent": _is_list_of(str),
    "shapes": lambda value: isinstance(value, dict) and all(map(_is_list_of(int), value.values())),
}
"""Entries that the first files of this version lack: layers without adapters in some blocks, and shapes of `others`."""


def write_native(path: Path, checkpoint: LoRACheckpoint) -> None:
    config = checkpoint.config
    stated = {
        "version": NATIVE_VERSION,
        "rank": config.rank,
        "alpha": config.alpha,
        "targets": config.targets,
        "blocks": config.blocks,
        "others": list(checkpoint.others),
        "absent": gaps(checkpoint.adapters),
        "shapes": {name: list(tensor.shape) for name, tensor in checkpoint.others.items()},
    }
    tensors = native_names(checkpoint.adapters) | checkpoint.others
    _write_file(path, tensors, {"format": NATIVE_FORMAT, NATIVE_KEY: json.dumps(stated)})


def read_named(opened: Opened, alpha: float | None) -> LoRACheckpoint:
    """Reads formats that names describe: diffusers', with or without PEFT's settings, and those with alphas."""
    parsed = parse(opened.tensors, opened.prefix)
    others = {name: opened.tensors[name] for name in parsed.rest if TEXT_ENCODER.match(name)}
    parsed = parsed._replace(rest=[name for name in parsed.rest if name not in others])
    config, adapters = _configured(opened, parsed, _settings_in(opened) or _settings_beside(opened), alpha)
    return LoRACheckpoint(config, adapters, others, opened.format, opened.left_out)


def read_peft(opened: Opened, alpha: float | None) -> LoRACheckpoint:
    path, parsed = opened.path.parent / PEFT_CONFIG, parse(opened.tensors, opened.prefix)
    _surplus(opened.path, parsed)  # a message about the names goes before one about the settings
    settings = read_json(path, f"it has to lie beside {opened.path.name}, whose rank and alpha it says")
    config, adapters = _configured(opened, parsed, (PEFT_CONFIG, settings), alpha)
    return LoRACheckpoint(config, adapters, {}, opened.format, opened.left_out)


def read_release(opened: Opened, alpha: float | None) -> LoRACheckpoint:
    tensors, prefix = opened.tensors, opened.prefix
    parsed = parse(tensors, prefix)
    beside = lambda name: not is_adapter(name) and f"{DIFFUSERS}." not in name and not name.startswith(prefix)
    others = {name: tensors[name] for name in parsed.rest if beside(name)}
    parsed = parsed._replace(rest=[name for name in parsed.rest if name not in others])
    ranks = [factor.array.shape[1] for factor in parsed.factors if factor.side == "a" and factor.array.ndim == 2]
    usual = most_common(ranks) if ranks else 0
    adapters = _whole(opened.path, parsed, [], lambda layer: usual)
    config = config_of(adapters, usual, _agreed(opened.path, None, alpha) or RELEASE_ALPHA)
    return LoRACheckpoint(config, adapters, others, opened.format, opened.left_out)


def write_diffusers(path: Path, checkpoint: LoRACheckpoint) -> None:
    """Writes diffusers' format, with alpha in the header: diffusers 0.42 refuses an SD3 file with alpha as a tensor."""
    _refuse_others(checkpoint, "diffusers")
    settings = {
        f"transformer.{key}": value for key, value in settings_of(checkpoint.config, checkpoint.adapters).items()
    }
    metadata = {"format": "pt", DIFFUSERS_KEY: json.dumps(settings)}
    _write_file(path, torch_names(checkpoint.adapters, DIFFUSERS_PREFIX), metadata)


def write_peft(folder: Path, checkpoint: LoRACheckpoint) -> None:
    _refuse_others(checkpoint, "peft")
    settings = settings_of(checkpoint.config, checkpoint.adapters)
    (folder / PEFT_CONFIG).write_text(json.dumps(settings, indent=2), "utf-8")
    _write_file(folder / PEFT_WEIGHTS, torch_names(checkpoint.adapters, PEFT_PREFIX), {"format": "pt"})


def write_release(path: Path, checkpoint: LoRACheckpoint) -> None:
    if checkpoint.config.alpha != RELEASE_ALPHA:
        raise CheckpointError(
            f"the release's format does not hold alpha, its code takes {RELEASE_ALPHA:g}, these adapters have "
            f"{checkpoint.config.alpha:g}: choose another format"
        )
    save_pickle(path, torch_names(checkpoint.adapters, RELEASE_PREFIX, ".default.weight") | checkpoint.others)


def _write_file(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    save_file({name: contiguous(array) for name, array in tensors.items()}, path, metadata)


def _whole(path: Path, parsed: Parsed, problems: list[str], rank: Callable[[str], int] | None) -> dict[str, Adapter]:
    """Returns whole adapters. Raises a CheckpointError that lists all problems."""
    problems = [*problems, *parsed.problems, *_surplus(path, parsed)]
    adapters = pair(parsed.factors, rank, problems)
    refuse(path, problems)
    return adapters


def _surplus(path: Path, parsed: Parsed) -> list[str]:
    """Returns a message for each tensor that is not used. Raises CheckpointError when their names show the cause."""
    if known := recognise(parsed.rest, OF_ADAPTERS):
        raise CheckpointError(f"{path}: {known}")
    return [*map(surplus, parsed.rest)]


def _configured(
    opened: Opened, parsed: Parsed, settings: tuple[str, dict[str, Any]] | None, alpha: float | None
) -> tuple[LoRAConfig, dict[str, Adapter]]:
    """Returns adapters of one rank and one alpha, made from those of a file in which each layer may have its own."""
    path, layers = opened.path, _layers(parsed)
    _surplus(path, parsed)  # a message about the names goes before one about the settings
    own, problems = _alphas(parsed, layers)
    if settings is None:
        adapters = _whole(path, parsed, problems, None)
        asked = _agreed(path, most_common(own.values()) if own else _kohyas_alpha(opened), alpha)
        alphas = own or {layer: asked or float(a.shape[1]) for layer, (a, _) in adapters.items()}
        return unite(adapters, alphas)
    stated = read_settings(path, *settings, layers, problems)
    if different := [layer for layer in own if own[layer] != stated.alphas[layer]]:
        layer = different[0]
        problems.append(f"{layer}: alpha is {stated.alphas[layer]:g} in {settings[0]}, {own[layer]:g} in the tensors")
    adapters = _whole(path, parsed, problems, stated.ranks.__getitem__)
    _agreed(path, most_common(stated.alphas.values()), alpha)
    return unite(adapters, stated.alphas)


def _layers(parsed: Parsed) -> list[str]:
    return list(dict.fromkeys(factor.layer for factor in parsed.factors))


def _alphas(parsed: Parsed, layers: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Returns every layer's alpha, from the tensors that hold them; and what is wrong with these tensors.

    There are no alphas if there are no such tensors.
    """
    found: dict[str, float] = {}
    problems: list[str] = []
    for key, of, tensor in parsed.alphas:
        value = float(tensor.reshape(-1)[0]) if tensor.size == 1 and tensor.dtype != np.bool_ else None
        if not is_alpha(value):
            what = f"{tensor.dtype} {list(tensor.shape)}" if value is None else f"{value:g}"
            problems.append(f"{key}: expected a finite positive number as alpha, found {what}")
        elif not {*of} & {*layers}:
            problems.append(f"{key}: an alpha of no adapter")
        else:
            found |= {layer: value for layer in of if value is not None}
    if parsed.alphas:
        problems += [f"missing: the alpha of {layer}" for layer in layers if layer not in found]
    return found, problems


def _kohyas_alpha(opened: Opened) -> float | None:
    """Returns the alpha of all layers from kohya's header; None if the header has none, or 0.

    None stands for each layer's rank, as 0 does for kohya. Under other tools' names the header is ignored: it is left
    over from before the scale was multiplied into the factors.
    """
    text = opened.metadata.get(KOHYA_KEY) if opened.format == "kohya" else None
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = -1.0
    if value and not is_alpha(value):
        raise CheckpointError(
            f"{opened.path}: {KOHYA_KEY} in its header: expected a finite positive number, found {text!r:.50}; "
            "correct it, or leave it out and say --alpha"
        )
    return value or None


def _agreed(path: Path, stated: float | None, asked: float | None) -> float | None:
    """Returns the file's alpha or else the user's; None if neither is given. Raises CheckpointError if they differ."""
    if asked is not None and not is_alpha(asked):
        raise CheckpointError(f"alpha is {asked}; expected a finite positive number")
    if stated is not None and asked not in (None, stated):
        raise CheckpointError(f"{path}: it says alpha is {stated:g}; --alpha {asked:g} is for files that do not say")
    return asked if stated is None else stated


def _settings_in(opened: Opened) -> tuple[str, dict[str, Any]] | None:
    """Returns PEFT's settings of the transformer's adapters from a header, and their name there, or None.

    The settings stand alone, or with the prefix `transformer.` beside the settings of others.
    """
    stated = _stated(opened, DIFFUSERS_KEY)
    ours = {key.removeprefix(DIFFUSERS_PREFIX): v for key, v in stated.items() if key.startswith(DIFFUSERS_PREFIX)}
    ours = ours or {key: value for key, value in stated.items() if "." not in key}
    return (DIFFUSERS_KEY, ours) if ours else None


def _settings_beside(opened: Opened) -> tuple[str, dict[str, Any]] | None:
    """Returns PEFT's settings from beside a file of PEFT's name, and the settings' name; otherwise None.

    The names in such a file may lack PEFT's prefix: `get_peft_model_state_dict` leaves it out.
    """
    path = opened.path.parent / PEFT_CONFIG
    if opened.path.stem != Path(PEFT_WEIGHTS).stem or not path.is_file():
        return None
    return PEFT_CONFIG, read_json(path)


def _stated(opened: Opened, key: str) -> dict[str, Any]:
    """Returns what the metadata says under a key; an empty dict if the key is absent.

    Numbers may be infinite or NaN here: the code that uses a number refuses it by name.
    """
    return parse_object(opened.metadata.get(key, "{}"), f"{opened.path}: {key} in its header", finite=False)


def _refuse_others(checkpoint: LoRACheckpoint, to: Format) -> None:
    if checkpoint.others:
        raise CheckpointError(
            f"the {to} format holds the transformer's adapters alone, and there are other tensors: "
            f"{in_short(checkpoint.others)}; choose the native format, or leave them out with --adapters-only"
        )


def in_short(others: Iterable[str]) -> str:
    """Returns names of tensors in short: those of text encoders are counted by their beginnings."""
    found = [(name, TEXT_ENCODER.match(name)) for name in others]
    counts = Counter(f"{begin[0]}*" for _, begin in found if begin)
    return ", ".join(
        listed([name for name, begin in found if not begin] + [f"{n} {name}" for name, n in counts.items()])
    )
