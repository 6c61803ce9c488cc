#!/usr/bin/env bash
# PEFT's layers_to_transform=[0] adapts a layer of every block of SD3 and none of block 0's attention.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet peft==0.21.2 diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 torch==2.13.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'EOF'
small = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}

import diffusers
import peft
from diffusers import SD3Transformer2DModel

print("peft", peft.__version__, "diffusers", diffusers.__version__)


def adapted(**settings):
    model = SD3Transformer2DModel(**small)
    model.add_adapter(peft.LoraConfig(target_modules=["to_q", "net.0.proj"], layers_to_transform=[0], **settings))
    return sorted(name for name, module in model.named_modules() if hasattr(module, "lora_A"))


found, named = adapted(), adapted(layers_pattern="transformer_blocks")
print("expected: to_q and net.0.proj of block 0, and of no other block")
print(f"seen: {found}")
print(f"seen with layers_pattern='transformer_blocks': {named}")
assert not any(name.endswith("to_q") for name in found)
assert {name.split(".")[1] for name in found} == {"0", "1", "2"}, "the 0 of `net.0` is taken for the layer's number"
assert {name.split(".")[1] for name in named} == {"0"} and "transformer_blocks.0.attn.to_q" in named
EOF
