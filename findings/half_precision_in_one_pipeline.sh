#!/usr/bin/env bash
# Of one fp16 checkpoint transformers keeps the dtype and diffusers does not: a pipeline of two dtypes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 torch==2.13.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'EOF'
small = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}

import diffusers
import transformers
from diffusers import SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel

print("diffusers", diffusers.__version__, "transformers", transformers.__version__)
clip = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
CLIPTextModel(CLIPTextConfig(**clip, bos_token_id=0, eos_token_id=1)).half().save_pretrained("text_encoder")
SD3Transformer2DModel(**small).half().save_pretrained("transformer")
found = CLIPTextModel.from_pretrained("text_encoder").dtype, SD3Transformer2DModel.from_pretrained("transformer").dtype
print("expected: both parts of a checkpoint in float16 are loaded in one dtype where none is named")
print(f"seen: text encoder {found[0]}, transformer {found[1]}")
assert [str(each) for each in found] == ["torch.float16", "torch.float32"]
EOF
