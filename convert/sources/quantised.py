"""Refuses quantised weights that are not read: one sentence says what they are, and what to fetch instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from seg4diff_jax.convert.errors import CheckpointError

INSTEAD = (
    "fetch the same model in 16 or 32 bits, or a form of 8 bits and fewer that is read: scaled fp8 or GGUF "
    "(docs/convert.md)"
)

FORMS: dict[str, re.Pattern[str]] = {
    "bitsandbytes' 4-bit weights (nf4 or fp4)": re.compile(
        r".+\.((nested_)?(absmax|quant_map)|quant_state\.bitsandbytes__\w+)"
    ),
    "bitsandbytes' 8-bit weights (LLM.int8)": re.compile(r".+\.(SCB|weight_format)"),
    "NVFP4 weights (4 bits in blocks of 16)": re.compile(r".+\.weight_scale_2"),
    "fp8 weights in blocks with a scale each": re.compile(r".+\.weight_scale_inv"),
    "GPTQ's or AWQ's 4-bit weights": re.compile(r".+\.(qweight|qzeros|g_idx)"),
    "quanto's weights": re.compile(r".+\.weight\._(data|scale|shift)"),
    "torchao's weights": re.compile(r".+\._weight_\w+"),
}
"""Names of the forms that are not read, and for each a pattern of tensors' names that no other form has."""


def refuse_foreign_forms(names: Collection[str], where: str) -> None:
    """Raises CheckpointError when a file's tensors are those of quantised weights that are not read."""
    for form, pattern in FORMS.items():
        if found := [name for name in names if pattern.fullmatch(name)]:
            raise refusal(where, f"{form} ({len(found)} tensors such as {found[0]})")


def refuse_quantization_config(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError when a `config.json` says that the weights beside it are quantised."""
    if not (described := config.get("quantization_config")):
        return
    method = described.get("quant_method") if isinstance(described, dict) else None
    bits = [bits for bits in (4, 8) if isinstance(described, dict) and described.get(f"load_in_{bits}bit") is True]
    kind = f"{bits[0]}-bit weights" if bits else "weights"
    raise refusal(where, f"{kind} quantised by {method or 'an unnamed method'}, as its quantization_config says")


def refusal(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {what} are not read; {INSTEAD}")
