"""Recognises, by their names, tensors that are not parameters of SD3's models, and says what to do about them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile

WRAPPERS = {
    r"_blocks[._]\d+[._].*_orig_mod[._]": (
        "`_orig_mod.` within names is of parts that were compiled one by one, as by `compile_repeated_blocks()`: save "
        "the state of the model before it is compiled"
    ),
    r"(?:^|[._])_orig_mod[._]": "`_orig_mod.` is of torch.compile: save the state of `model._orig_mod`",
    r"(?:^|[._])_fsdp_wrapped_module[._]": (
        "`_fsdp_wrapped_module.` is of FullyShardedDataParallel: save its full state, as `get_model_state_dict` with "
        "`full_state_dict=True` gives it"
    ),
    r"(?:^|[._])_checkpoint_wrapped_module[._]": (
        "`_checkpoint_wrapped_module.` is of PyTorch's `checkpoint_wrapper`: save the state of the modules inside"
    ),
    r"(?:^|\.)module\.": "`module.` is of DistributedDataParallel: save the state of `model.module`",
}
"""Patterns of names that wrappers of a model write, and for each what to do."""
EXPECTED = "expected Stable Diffusion 3 or 3.5"
OTHER_MODELS = {
    r"(?:^|[._])controlnet_(?:blocks|x_embedder|cond)|^control_model\.": (
        f"a ControlNet, which steers another model and makes no picture itself: {EXPECTED}"
    ),
    r"^(?:ip_adapter|image_proj)\.": (
        f"an IP-Adapter, which steers another model and makes no picture itself: {EXPECTED}"
    ),
    r"(?:^|[._])(?:diffusion_model[._]|lora_unet_)(?:input_blocks|middle_block|output_blocks)[._]|"
    r"^(?:base_model\.model\.|unet[._]|lora_unet_|lycoris_)?(?:down_blocks|mid_block|up_blocks)[._]|"
    r"^(?:conditioner\.embedders|cond_stage_model)\.": (
        f"a U-Net with its text encoders, as of Stable Diffusion 1.5, 2 and XL: {EXPECTED}"
    ),
    r"(?:^|[._])(?:double_blocks|single_blocks|single_transformer_blocks)[._]\d": (
        f"FLUX's transformer or one like it, with blocks for both streams and for one: {EXPECTED}"
    ),
    r"(?:^|[._])transformer_blocks[._]\d+[._](?:attn1|(?:img|txt)_(?:mod|mlp))[._]|(?:^|[._])adaln_single[._]|"
    r"(?:^|[._])(?:double|single)_stream_blocks[._]\d|"
    r"(?:^|\.|lora_unet_)blocks[._]\d+[._](?:self_attn|cross_attn|attn1|attn2)[._]|"
    r"(?:^|\.|lora_unet_)layers[._]\d+[._](?:attention|attn|feed_forward)[._]": (
        f"another diffusion transformer: {EXPECTED}"
    ),
}
"""Patterns of names in models of other families, and for each what the model is."""
OF_OWN = WRAPPERS | {
    r"^(?:model_ema|ema_model|ema)\.": (
        "names like `model_ema.` are of a moving average (EMA) of the weights: save it or them alone, under the "
        "names of the weights"
    ),
    r"\.base_layer\.": (
        "adapters were still in the model: call `unload_lora_weights()` or PEFT's `merge_and_unload()` before saving"
    ),
    r"\.lora_[AB]\.|\.lora[._](?:down|up)\.|^lora_(?:unet|transformer|te\d?)_": (
        "adapters are read with `--lora`, from a file without the model"
    ),
    r"\.to_(?:added_)?(?:qkv|kv)\.": (
        "projections of attention were fused: call `unfuse_qkv_projections()` before saving"
    ),
}
"""Patterns of names that a saved model's state may hold beside the model's own, and for each what to do."""
OF_MODELS = OF_OWN | OTHER_MODELS
"""The patterns for files that may hold a model of another family."""
OF_ADAPTERS = (
    WRAPPERS
    | {
        r"\.base_layer\.weight$": (
            "a whole model's state with adapters in it: save them alone, as `save_lora_weights` or PEFT's "
            "`save_pretrained` does"
        ),
    }
    | OTHER_MODELS
    | {
        r"(?:^|[._])text_model[._]encoder[._]|(?:^|[._])encoder[._]block[._]": (
            "adapters of a text encoder, which are not used: expected some of SD3's transformer"
        ),
    }
)
"""The patterns for files of adapters."""


def recognise(names: Iterable[str], rows: Mapping[str, str] = OF_MODELS) -> str | None:
    """Returns one sentence about tensors that the model has no place for; None if no pattern matches their names."""
    names = list(names)
    for pattern, remedy in rows.items():
        found = [name for name in names if re.search(pattern, name)]
        if found:
            many = f"{len(found)} tensors like" if len(found) > 1 else "tensor"
            return f"{many} {found[0]:.200}: {remedy}"
    return None


def recognise_prefix(names: Iterable[str]) -> str | None:
    """Returns one sentence about the prefix that all of `names` share; None if they share none.

    For a file in which no tensor has a name of the model.
    """
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
