#!/usr/bin/env bash
# diffusers' load_lora_weights of SD3 takes a file under kohya's or OneTrainer's names and adapts nothing.
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
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

print("diffusers", diffusers.__version__)
absent = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
files = {
    "diffusers": ("transformer.transformer_blocks.0.attn.to_q", "lora_A", "lora_B"),
    "kohya": ("lora_unet_joint_blocks_0_x_block_attn_proj", "lora_down", "lora_up"),
    "OneTrainer": ("lora_transformer_transformer_blocks_0_attn_to_q", "lora_down", "lora_up"),
}
found = {}
for name, (module, down, up) in files.items():
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**small), scheduler=FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(absent)
    )
    tensors = {f"{module}.{down}.weight": torch.ones(2, 16), f"{module}.{up}.weight": torch.ones(16, 2)}
    if name != "diffusers":
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    pipe.load_lora_weights(tensors)
    found[name] = sum("lora_" in each for each, _ in pipe.transformer.named_parameters())
print("expected: the file is applied, as kohya's names are for other models, or an error says that it is not")
print(f"seen: tensors of adapters in the transformer: {found} (the log calls it safe to ignore)")
assert found == {"diffusers": 2, "kohya": 0, "OneTrainer": 0}
EOF
