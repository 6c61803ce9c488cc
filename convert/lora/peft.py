"""Reads PEFT's settings of low-rank adapters (`adapter_config.json`) as PEFT does, and writes them.

`SETTINGS` has every key of PEFT's LoraConfig and says how the key is treated. A setting that changes the computation is
read or must be off. A key that is not in the table must be off too, so that no setting of a later PEFT is overlooked.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import regex

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.lora.layers import gaps, is_alpha, refuse
from seg4diff_jax.convert.lora.names import MODULES, module_of
from seg4diff_jax.models.lora import Adapter, LoRAConfig

Value = TypeVar("Value")
LARGEST_RANK = 1 << 20
SECONDS_TO_MATCH = 3.0
"""Time limit for all patterns of a file. They are regular expressions, and can be made to take for ever."""
LONGEST_PATTERN = 10_000

SETTINGS: dict[str, Literal["read", "off", "irrelevant"]] = {
    "peft_type": "read",
    "r": "read",
    "lora_alpha": "read",
    "use_rslora": "read",
    "rank_pattern": "read",
    "alpha_pattern": "read",
    "target_modules": "read",
    "exclude_modules": "read",
    "layers_to_transform": "read",
    "layers_pattern": "read",
    "init_lora_weights": "read",
    "bias": "read",
    # With these an adapter computes something else than alpha / rank (x A) B, or adapts something else than layers.
    "use_dora": "off",
    "lora_bias": "off",
    "modules_to_save": "off",
    "layer_replication": "off",
    "target_parameters": "off",
    "trainable_token_indices": "off",
    "alora_invocation_tokens": "off",
    "use_qalora": "off",
    "use_bdlora": "off",
    "arrow_config": "off",
    "kasa_config": "off",
    "monteclora_config": "off",
    "velora_config": "off",
    # These say where the adapter comes from and how it was trained, or do not matter for linear layers in PyTorch.
    "task_type": "irrelevant",
    "auto_mapping": "irrelevant",
    "peft_version": "irrelevant",
    "base_model_name_or_path": "irrelevant",
    "revision": "irrelevant",
    "inference_mode": "irrelevant",
    "lora_dropout": "irrelevant",
    "fan_in_fan_out": "irrelevant",
    "megatron_config": "irrelevant",
    "megatron_core": "irrelevant",
    "loftq_config": "irrelevant",
    "eva_config": "irrelevant",
    "corda_config": "irrelevant",
    "lora_ga_config": "irrelevant",
    "qalora_group_size": "irrelevant",
    "runtime_config": "irrelevant",
    "ensure_weight_tying": "irrelevant",
}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Initialisations that do not change the base model's weights.

The others (pissa, olora, corda, loftq, lora_ga) do: the file's factors belong to a base model that is not in the file.
"""


class Stated(NamedTuple):
    """What settings say about a file's layers, by our per-layer names.

    Attributes:
      ranks: rank of every layer.
      alphas: alpha of every layer, in the sense of alpha / rank.
    """

    ranks: dict[str, int]
    alphas: dict[str, float]


class _TooSlow(Exception):
    pass


class _Patterns:
    """Matches PEFT's regular expressions, within one time limit for all of them together."""

    def __init__(self) -> None:
        self.end = time.monotonic() + SECONDS_TO_MATCH
        self.compiled: dict[str, Any] = {}

    def match(self, pattern: str, name: str) -> Any:
        if len(pattern) > LONGEST_PATTERN:
            raise _TooSlow
        if pattern not in self.compiled:
            self.compiled[pattern] = regex.compile(pattern)
        left = self.end - time.monotonic()
        if left <= 0:
            raise _TooSlow
        try:
            return self.compiled[pattern].match(name, timeout=left)
        except TimeoutError:
            raise _TooSlow from None


def read_settings(
    where: object, name: str, settings: Mapping[str, Any], layers: Collection[str], problems: list[str]
) -> Stated:
    """Returns rank and alpha of every layer for which a file has an adapter.

    Args:
      where, name: the file, and the name of the settings in it.
      layers: our per-layer names of these layers.
      problems: a list to which this function adds what cannot be read, and how the file's layers differ from those that
        the settings name.

    Raises CheckpointError when the settings are of another kind of adapters. Raises it, with all problems so far, when
    a setting that is needed cannot be used.
    """
    if kind := other_kind(settings):
        raise CheckpointError(f"{where}: {name}: {kind}")
    found = [line for key, value in settings.items() if (line := _refusal(key, value))]
    needed = [
        f"{key} is {_short(settings.get(key))}; expected {what}"
        for key, (fits, what) in KINDS.items()
        if not fits(settings.get(key))
    ]
    problems += [f"{name}: {line}" for line in needed + found]
    if needed:
        refuse(where, problems)
    try:
        stated, differences = _apply(settings, layers, _Patterns())
    except _TooSlow:
        limit = f"{LONGEST_PATTERN} characters or {SECONDS_TO_MATCH:g} s to match"
        refuse(where, [*problems, f"{name}: its patterns take more than {limit}: name the layers in full instead"])
        raise AssertionError from None
    except (regex.error, RecursionError) as error:
        reason = str(error) or "nested too deeply"
        refuse(where, [*problems, f"{name}: one of its patterns is no regular expression: {reason}"])
        raise AssertionError from None
    problems += [f"{name}: {line}" for line in differences]
    return stated


def other_kind(settings: Mapping[str, Any]) -> str | None:
    """Returns a message if settings are of adapters that are not low-rank, otherwise None.

    The other settings of such adapters have no meaning here.
    """
    kind = settings.get("peft_type", "LORA")
    return None if kind == "LORA" else f"peft_type is {_short(kind)}; only 'LORA' is implemented: merge it with PEFT"


def _refusal(key: str, value: Any) -> str | None:
    """Returns a message if a setting makes the adapter something else than is read here, otherwise None."""
    off = value is None or value is False or value in ([], {}, "")
    match SETTINGS.get(key):
        case "off" if not off:
            return f"{key} is {_short(value)}; it is not implemented"
        case None if not off:
            return f"{key} is {_short(value)}; this setting is not known, and could change what is computed"
        case "read" if key == "bias" and value != "none":
            return f"bias is {_short(value)}; 'none' is implemented"
        case "read" if key == "init_lora_weights" and not _is_plain(value):
            return (
                f"init_lora_weights is {_short(value)}: training changed the base's weights too, and the file does not "
                "have them; make it a plain adapter with PEFT's save_pretrained and its option "
                "path_initial_model_for_weight_conversion"
            )
    return None


def _is_plain(start: Any) -> bool:
    return start is None or (start.lower() if isinstance(start, str) else start) in PLAIN_STARTS


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_RANK


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _by_pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value) or (isinstance(value, list) and all(map(fits, value)))


NAMES = (_list_of(lambda value: isinstance(value, str)), "names or a pattern")
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a positive whole number"),
    "lora_alpha": (is_alpha, "a finite positive number"),
    "use_rslora": (lambda value: value in (None, False, True), "true or false"),
    "rank_pattern": (_by_pattern(_is_rank), "positive whole numbers by pattern"),
    "alpha_pattern": (_by_pattern(is_alpha), "finite positive numbers by pattern"),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_to_transform": (_list_of(_is_number), "whole numbers"),
    "layers_pattern": NAMES,
}
"""Settings whose values are used, with the check of each value and the expected value in words."""


def _apply(settings: Mapping[str, Any], layers: Collection[str], patterns: _Patterns) -> tuple[Stated, list[str]]:
    endings = ("target_modules", "exclude_modules")
    sets = {key: frozenset(settings[key]) for key in endings if isinstance(settings.get(key), list)}
    settings = {**settings, **sets}
    ranks, alphas = (_by_ending(settings.get(key) or {}) for key in ("rank_pattern", "alpha_pattern"))
    stated = Stated({}, {})
    differences = []
    for layer in layers:
        name = module_of(layer)
        rank = stated.ranks[layer] = _value(ranks, name, settings["r"], patterns)
        alpha = float(_value(alphas, name, settings["lora_alpha"], patterns))
        stated.alphas[layer] = alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
        if key := _left_out_by(settings, name, patterns):
            says = "is not among" if key == "target_modules" else "has an adapter and is left out by"
            differences.append(f"{name} {says} {key}")
    for layer in gaps(layers, MODULES, every_block=True) if settings.get("target_modules") is not None else ():
        if not _left_out_by(settings, module_of(layer), patterns):
            differences.append(f"missing: an adapter of {layer}, {module_of(layer)} in the settings")
    return stated, differences


def _by_ending(by_pattern: Mapping[str, Value]) -> list[tuple[str, str, Value]]:
    """Returns each pattern with the ending that names must have to match, and with its value.

    Comparing endings first saves time, since there can be many patterns. The ending is "" if a pattern is not a plain
    name with a dot.
    """
    literal = re.compile(r"\^?[\w.]+")
    return [(k, k.rpartition(".")[2] if literal.fullmatch(k) and "." in k else "", v) for k, v in by_pattern.items()]


def _value(by_pattern: list[tuple[str, str, Value]], name: str, default: Value, patterns: _Patterns) -> Value:
    """Returns a module's rank or alpha: the value of the first pattern that matches the end of the module's name."""
    found = (
        value
        for pattern, ending, value in by_pattern
        if name.endswith(ending) and patterns.match(rf"(.*\.)?({pattern})$", name)
    )
    return next(found, default)


def _left_out_by(settings: Mapping[str, Any], name: str, patterns: _Patterns) -> str | None:
    """Returns the setting because of which PEFT gives a module no adapter; None if there is none."""
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if excluded and _names(excluded, name, patterns):
        return "exclude_modules"
    if targets is not None and targets != "all-linear" and not _names(targets, name, patterns):
        return "target_modules"
    if isinstance(targets, frozenset) and name not in targets and not _in_layers(settings, name, patterns):
        return "layers_to_transform"
    return None


def _names(wanted: Any, name: str, patterns: _Patterns) -> bool:
    """Whether a setting names a module: by a pattern for the whole name, or by the end of the name."""
    if isinstance(wanted, str):
        return bool(patterns.match(rf"(?:{wanted})\Z", name))
    parts = name.split(".")
    return any(".".join(parts[start:]) in wanted for start in range(len(parts)))


def _in_layers(settings: Mapping[str, Any], name: str, patterns: _Patterns) -> bool:
    """Whether PEFT's `layers_to_transform` includes a module, by a number in its name.

    PEFT takes the first number that follows one of `layers_pattern`. Without such a pattern PEFT takes the first number
    that at least two parts of the name precede. SD3's names begin with `transformer_blocks.3`, so that PEFT does not
    find the block's number there. It finds the 0 of `ff.net.0.proj`, and no number in layers of attention.
    """
    numbers, words = settings.get("layers_to_transform"), settings.get("layers_pattern") or []
    if numbers is None or numbers == []:
        return True
    forms = [rf"(?:^|.*?\.){word}\.(?P<idx>\d+)\." for word in ([words] if isinstance(words, str) else words)]
    matches = (patterns.match(form, name) for form in forms or [r".*?\.[^.]*\.(?P<idx>\d+)\."])
    found = next(filter(None, matches), None)
    return found is not None and int(found["idx"]) in (numbers if isinstance(numbers, list) else [numbers])


def settings_of(config: LoRAConfig, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Returns PEFT's settings. Layers are named in full, so that no other layer with a similar name is adapted."""
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [module_of(layer) for layer in adapters],
    }
