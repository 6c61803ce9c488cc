"""The names of adapters' tensors in every format of SD3's adapters.

A name consists of a prefix, a layer of a block, and the tensor of the layer's adapter. The layer has diffusers' name
(`transformer_blocks.3.attn.to_q`) or Stability's (`joint_blocks.3.x_block.attn.qkv`, where q, k and v are one). The
parts of the layer's name are joined by dots or, after some prefixes, by underscores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from seg4diff_jax.convert.names import Rule
from seg4diff_jax.convert.tables import mmdit as table
from seg4diff_jax.models.lora import Adapter
from seg4diff_jax.models.sd3.model import MMDiTConfig

Side = Literal["a", "b"]
Layers = dict[str, tuple[str, ...]]
"""Our names of each linear layer of a block, by another naming's name: three names where q, k and v are one layer."""


def _layers(rules: list[Rule], blocks: str) -> Layers:
    theirs, ours = (
        re.compile(rf"{blocks}\.(?:\{{i\}}|0)\.(.+)\.weight"),
        re.compile(r"blocks\.(?:\{i\}|0)\.(.+)\.kernel"),
    )
    names = {}
    for rule in rules:
        module, targets = theirs.fullmatch(rule.source_names[0]), [ours.fullmatch(name) for name in rule.target_names]
        if module and all(targets):
            names[module[1]] = tuple(target[1] for target in targets if target)
    return names


DIFFUSERS, STABILITY = "transformer_blocks", "joint_blocks"
LAYERS: dict[str, Layers] = {
    DIFFUSERS: _layers(table.diffusers(MMDiTConfig()), DIFFUSERS),
    STABILITY: _layers(table.stability(MMDiTConfig()), STABILITY),
}
FLAT = {blocks: {name.replace(".", "_"): ours for name, ours in names.items()} for blocks, names in LAYERS.items()}
MODULES = {targets[0]: name for name, targets in LAYERS[DIFFUSERS].items()}
"""diffusers' name of each linear layer of a block, by our name."""

FLAT_PREFIXES = {"lora_unet_": "kohya", "lora_transformer_": "onetrainer", "lycoris_": "lycoris"}
"""Prefixes of names with underscores between all parts of the layer's name."""
DOTTED_PREFIXES = {
    "base_model.model.": "peft",
    "transformer.": "diffusers",
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
}

PARTS = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_down": "a",
    "lora_up": "b",
    "lora.down": "a",
    "lora.up": "b",
}
# PEFT puts an adapter's name before `.weight` in a model's own state.
TENSOR = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.[^.]+)?\.weight")
ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
PROCESSOR = re.compile(r"(attn2?)\.(?:processor\.)?(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
"""Matches names of diffusers' former attention processors."""

TEXT_ENCODER = re.compile(r"text_encoder(_[23])?\.|text_encoders\.|lora_te[123]?_|bundle_emb\.|clip_[lg]\.|t5(xxl)?\.")
"""Matches the beginning of tensors' names beside the transformer's: adapters of text encoders, and embeddings."""
OTHER_KINDS = {
    "DoRA": re.compile(r"\.dora_scale$|lora_magnitude_vector|\.magnitude$"),
    "LoKr": re.compile(r"\.lokr_"),
    "LoHa": re.compile(r"\.hada_"),
    "OFT": re.compile(r"\.(b?oft_|oft_blocks)"),
    "IA3": re.compile(r"\.(ia3_l|on_input$)"),
    "VeRA": re.compile(r"(^|\.)vera_(lambda_|[AB](\.|$))"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "a norm's weight": re.compile(r"\.[wb]_norm$"),
    "a Tucker decomposition": re.compile(r"\.lora_mid\."),
    "a difference of whole weights": re.compile(r"\.diff(_b)?$"),
    "a bias": re.compile(r"\.lora_B(\.[^.]+)?\.bias$|\.base_layer\.bias$"),
}
OUTSIDE = re.compile(
    r"(^|[._])(context_embedder|proj_out|norm_out|pos_embed|time_text_embed|x_embedder|t_embedder|y_embedder|final_layer)"
    r"[._]"
)
"""Matches layers of SD3's transformer that belong to no block, under diffusers' names and Stability's."""


class Factor(NamedTuple):
    """One tensor of a layer's adapter, in our layout.

    Attributes:
      key: the tensor's name in the file.
      shape: the tensor's shape in the file.
      layer: our per-layer name.
      scale_first: True for B of a modulation under diffusers' name. diffusers puts the scale before the shift where
        there is no gate.
    """

    key: str
    layer: str
    side: Side
    array: np.ndarray
    shape: tuple[int, ...]
    scale_first: bool = False


class Parsed(NamedTuple):
    """A file's tensors by their kinds.

    Attributes:
      alphas: for each alpha its name in the file, our per-layer names of the layers that it is for, and the tensor.
      rest: names of the other tensors.
      problems: what is wrong with tensors that are in none of these.
    """

    factors: list[Factor]
    alphas: list[tuple[str, list[str], np.ndarray]]
    rest: list[str]
    problems: list[str]


def parse(tensors: Mapping[str, np.ndarray], prefix: str) -> Parsed:
    """Sorts a file's tensors, which have PyTorch's layout and the names of any tool.

    A layer that is q, k and v in one becomes three layers, each with a third of B.
    """
    factors: list[Factor] = []
    alphas: list[tuple[str, list[str], np.ndarray]] = []
    rest: list[str] = []
    problems: list[str] = []
    for key, tensor in tensors.items():
        name = PROCESSOR.sub(_former, key.removeprefix(prefix)) if key.startswith(prefix) else ""
        found = TENSOR.fullmatch(name) or ALPHA.fullmatch(name)
        layers, scale_first = _place(found["layer"], flat=prefix in FLAT_PREFIXES) if found else ([], False)
        if not found or not layers:
            rest.append(key)
        elif "part" not in found.groupdict():
            alphas.append((key, layers, tensor))
        elif PARTS[found["part"]] == "a":
            factors += [Factor(key, layer, "a", tensor.T, tensor.shape) for layer in layers]
        elif tensor.ndim and len(tensor) % len(layers) == 0:
            parts = np.split(tensor, len(layers))
            each = zip(layers, parts, strict=True)
            factors += [Factor(key, layer, "b", b.T, tensor.shape, scale_first) for layer, b in each]
        else:
            problems.append(f"{key}: expected rows for q, k and v, a third for each; found {list(tensor.shape)}")
    return Parsed(factors, alphas, rest, problems)


def _former(found: re.Match[str]) -> str:
    attention, layer, part = found.groups()
    return f"{attention}.{'to_out.0' if layer == 'to_out' else layer}.lora.{part}.weight"


def _place(name: str, *, flat: bool) -> tuple[list[str], bool]:
    """Returns our per-layer names of a layer, none for one outside the blocks; and whether its scale comes first."""
    dot, known = ("_", FLAT) if flat else (r"\.", LAYERS)
    found = re.fullmatch(rf"({DIFFUSERS}|{STABILITY}){dot}(0|[1-9]\d{{0,5}}){dot}(.+)", name)
    targets = known[found[1]].get(found[3], ()) if found else ()
    scale_first = bool(found) and found[1] == DIFFUSERS and targets == ("text.modulation",)
    return [f"blocks.{found[2]}.{target}" for target in targets if found], scale_first


def parse_native(tensors: Mapping[str, np.ndarray]) -> Parsed:
    """Sorts a file's tensors, which have our own names and our own layout."""
    pattern = re.compile(r"(?P<layer>blocks\.(?:0|[1-9]\d{0,5})\.(?P<target>.+))\.lora_(?P<side>[ab])")
    factors: list[Factor] = []
    for key, tensor in tensors.items():
        found = pattern.fullmatch(key)
        if found and found["target"] in MODULES:
            side: Side = "a" if found["side"] == "a" else "b"
            factors.append(Factor(key, found["layer"], side, tensor, tensor.shape))
    known = {factor.key for factor in factors}
    return Parsed(factors, [], [key for key in tensors if key not in known], [])


def native_names(adapters: Mapping[str, Adapter]) -> dict[str, np.ndarray]:
    sides = {"a": 0, "b": 1}
    return {f"{layer}.lora_{side}": pair[i] for layer, pair in adapters.items() for side, i in sides.items()}


def torch_names(adapters: Mapping[str, Adapter], prefix: str, suffix: str = ".weight") -> dict[str, np.ndarray]:
    """Returns factors in PyTorch's layout, under diffusers' names of layers."""
    tensors = {}
    for layer, (a, b) in adapters.items():
        if scale_first(layer, a, b):
            b = swap_halves(b)
        for side, array in (("A", a), ("B", b)):
            tensors[f"{prefix}{module_of(layer)}.lora_{side}{suffix}"] = array.T
    return tensors


def scale_first(layer: str, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether diffusers puts the scale before the shift in this layer: only in the last block's modulation of text.

    That modulation has no gate: B has twice as many outputs as A has inputs.
    """
    return target_of(layer) == "text.modulation" and b.shape[1] == 2 * a.shape[0]


def swap_halves(b: np.ndarray) -> np.ndarray:
    """Returns B [rank, out] with the halves of the outputs exchanged."""
    return np.concatenate(np.split(b, 2, axis=1)[::-1], axis=1)


def is_adapter(name: str) -> bool:
    """Whether a tensor, by its name, belongs to an adapter of any kind."""
    return ".lora" in name or "_lora." in name or any(kind.search(name) for kind in OTHER_KINDS.values())


def surplus(name: str) -> str:
    """Returns a message about a tensor that no adapter can use."""
    merge = "merge it into a model with the tool that trained it"
    for kind, pattern in OTHER_KINDS.items():
        if pattern.search(name):
            return f"surplus: {name} is {kind}, which is not implemented; only plain low-rank adapters are: {merge}"
    if OUTSIDE.search(name):
        return f"surplus: {name} is of a layer outside SD3's blocks, which is not adapted here: {merge}"
    return f"surplus: {name} is not a tensor of an adapter of a linear layer in SD3's blocks"


def module_of(layer: str) -> str:
    """Returns diffusers' name of the layer that we call `layer`."""
    return f"{DIFFUSERS}.{block_of(layer)}.{MODULES[target_of(layer)]}"


def block_of(layer: str) -> int:
    return int(layer.split(".")[1])


def target_of(layer: str) -> str:
    return layer.split(".", 2)[2]
