"""Checks the types and bounds of a configuration's values before a model is made from them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.families import SD3
from seg4diff_jax.quoting import quoted


class Bounds(NamedTuple):
    """A range from `least` to `most`, both included; `open` excludes `least`."""

    least: float
    most: float
    open: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        return math.isfinite(value) and self.least <= value <= self.most and not (self.open and value == self.least)

    def __str__(self) -> str:
        if self.open:
            return f"more than {self.least:g}" + ("" if math.isinf(self.most) else f", up to {self.most:g}")
        if math.isinf(self.most):
            return f"at least {self.least}"
        power = int(self.most).bit_length() - 1
        return f"{self.least} to {f'2^{power}' if power >= 20 and self.most == 2**power else self.most}"


LAYERS, SIZE = Bounds(1, 1000), Bounds(1, 2**20)
POSITIVE = Bounds(0, math.inf, open=True)
BOUNDS: dict[str, Bounds] = {
    "num_layers": LAYERS,
    "num_hidden_layers": LAYERS,
    "dual_attention_layers": Bounds(0, LAYERS.most - 1),
    "layers_per_block": Bounds(1, 16),
    "sample_size": Bounds(1, 4096),
    "pos_embed_max_size": Bounds(1, 4096),
    "image_size": Bounds(1, 16384),
    "patch_size": Bounds(1, 1024),
    "vocab_size": Bounds(1, 2**24),
    "relative_attention_num_buckets": Bounds(4, 2**20),
    "eos_token_id": Bounds(0, 2**24),
    "layer_norm_eps": Bounds(0, 1, open=True),
    "layer_norm_epsilon": Bounds(0, 1, open=True),
    "scaling_factor": POSITIVE,
    "shift_factor": Bounds(-1000, 1000),
}
"""Bounds by the field's name; for every other number the bounds are SIZE.

They are far wider than any model needs, but refuse a damaged number before anything of its size is made.
"""

TYPES: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "bool": lambda value: type(value) is bool,
    "float": lambda value: type(value) in (int, float),
    "float | None": lambda value: value is None or type(value) in (int, float),
    "str": lambda value: type(value) is str,
    "tuple[int, ...]": lambda value: type(value) in (list, tuple) and all(type(each) is int for each in value),
}
"""For each type of a field, whether a JSON value has this type. `true` is not an integer here."""
PUBLISHED: dict[str, Callable[[Any], bool]] = {
    "qk_norm": lambda value: value is None or type(value) is str,
    "dual_attention_layers": lambda value: value is None or TYPES["tuple[int, ...]"](value),
    "out_channels": lambda value: value is None or type(value) is int,
    "pos_embed_max_size": lambda value: value is None or type(value) is int,
}
"""Checks of the transformer's keys whose types in its file differ from the types in the dataclass."""


def check_values(kind: type, config: Mapping[str, Any], published: Mapping[str, Callable[[Any], bool]] = {}) -> None:
    """Raises ValueError, which names the key, when a value has a wrong type or is out of bounds.

    Args:
      kind: the configuration's dataclass.
      published: checks of the keys whose types in files differ from the types in the dataclass.
    """
    for wrong in wrong_values(kind, config, published):
        raise ValueError(wrong)


def wrong_values(
    kind: type, config: Mapping[str, Any], published: Mapping[str, Callable[[Any], bool]] = {}
) -> Iterator[str]:
    """Yields a message for each value of a wrong type or out of bounds. Arguments are as for `check_values`."""
    for field in fields(kind):
        if field.name not in config:
            continue
        value, expected = config[field.name], str(field.type)
        if not published.get(field.name, TYPES[expected])(value):
            yield f"{field.name} is {quoted(value)}; expected {expected}"
            continue
        bounds = BOUNDS.get(field.name, SIZE)
        for number in value if isinstance(value, list | tuple) else (value,):
            if type(number) in (int, float) and number not in bounds:
                yield f"{field.name} is {quoted(value)}; expected {bounds}"


LAYER = re.compile(
    r"(?:transformer_blocks|joint_blocks|text_model\.encoder\.layers|encoder\.block|blocks)\.(\d{1,9})\."
)
"""Matches the beginning of a layer's tensor name: diffusers' and transformers', Stability's, or ours."""


def check_depth(name: str, config: Any, tensors: Iterable[str], where: str) -> None:
    """Raises CheckpointError when a configuration has more layers than the tensors' names show.

    The check makes no model, since the time for that grows with the claimed depth.

    Args:
      config: the component's typed configuration.
    """
    key = SD3.components[name].depth
    if key is None:
        return
    numbers = {int(found[1]) for tensor in tensors if (found := LAYER.match(tensor))}
    if numbers and getattr(config, key) > max(numbers) + 1:
        raise CheckpointError(
            f"{name} ({where}): config.json says that {key} is {getattr(config, key)}, and its tensors "
            f"are of {len(numbers)} layers, 0 to {max(numbers)}: one of the two is of another model, or damaged"
        )
