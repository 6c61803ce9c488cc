"""Names that tell where tensors come from when they are no model's own, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile

WRAPPERS = {
    r"(?:^|\.)_orig_mod\.": "`_orig_mod.` is of torch.compile: save the state of `model._orig_mod`",
    r"(?:^|\.)module\.": "`module.` is of DistributedDataParallel: save the state of `model.module`",
}
"""What stands before a whole model's names, as a regular expression, and the remedy."""
OF_MODELS = WRAPPERS | {
    r"^model_ema\.": (
        "`model_ema.` is a moving average (EMA) of the weights: save it or them alone, under the names of the weights"
    ),
    r"\.base_layer\.": (
        "adapters were still in the model: call `unload_lora_weights()` or PEFT's `merge_and_unload()` before saving"
    ),
    r"\.lora_[AB]\.": "adapters are read with `--lora`, from a file without the model",
    r"\.to_(?:added_)?(?:qkv|kv)\.": (
        "projections of attention were fused: call `unfuse_qkv_projections()` before saving"
    ),
}
"""The same of everything that a model's state may hold and the model itself does not."""
OF_ADAPTERS = WRAPPERS | {
    r"\.base_layer\.weight$": (
        "a whole model's state with adapters in it: save them alone, as `save_lora_weights` or PEFT's "
        "`save_pretrained` does"
    ),
    r"(?:^|[._])text_model[._]encoder[._]|(?:^|[._])encoder[._]block[._]": (
        "adapters of a text encoder, which are not used: expected some of SD3's transformer"
    ),
}
"""The same of what lies in files of adapters."""


def recognise(names: Iterable[str], rows: Mapping[str, str] = OF_MODELS) -> str | None:
    """What is to be said, in one sentence, of tensors that have no place; None where their names tell nothing."""
    names = list(names)
    for pattern, remedy in rows.items():
        found = [name for name in names if re.search(pattern, name)]
        if found:
            many = f"{len(found)} tensors like" if len(found) > 1 else "tensor"
            return f"{many} {found[0]:.200}: {remedy}"
    return None


def recognise_prefix(names: Iterable[str]) -> str | None:
    """The same of a model that has no tensor of its own name, when all of `names` begin alike; otherwise None."""
    names = sorted(names)
    if len(names) < 2:
        return None
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(names[0].split("."), names[-1].split("."), strict=False))
    prefix = ".".join(part for part, _ in alike)
    if not prefix:
        return None
    return (
        f"the names of all its tensors begin with `{prefix:.200}.`, which SD3's do not; save the state of the module "
        "below that"
    )
