#!/usr/bin/env bash
# A folder that was saved to twice, whole and in shards: transformers reads the whole file, diffusers the shards.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 torch==2.13.0 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'EOF'
import shutil

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

print("transformers", transformers.__version__, "diffusers", diffusers.__version__)
sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
models = {
    "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**sizes, projection_dim=16, bos_token_id=0, eos_token_id=2)),
    "vae": AutoencoderKL(block_out_channels=(32,)),
}
read = {}
for name, model in models.items():
    for first, shards in ((True, "1GB"), (False, "20KB")):  # the first save whole, the second in shards
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0 if first else 2.0)
        model.save_pretrained(f"{name}/{shards}", max_shard_size=shards)
        shutil.copytree(f"{name}/{shards}", f"{name}/both", dirs_exist_ok=True)
    read[name] = next(type(model).from_pretrained(f"{name}/both").parameters()).flatten()[0].item()
print("expected: one rule for both, or an error: the folder holds two sets of weights")
says = {1.0: "the whole file", 2.0: "the shards"}
print("seen:", ", ".join(f"{name}: {says[value]}" for name, value in read.items()))
assert read == {"text_encoder": 1.0, "vae": 2.0}
EOF
