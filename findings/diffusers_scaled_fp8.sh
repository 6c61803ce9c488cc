#!/usr/bin/env bash
# diffusers reads a scaled fp8 file of SD3 without its scales: weights are hundreds of times too large.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 torch==2.13.0 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'EOF'
small = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}
small["num_layers"] = 1

import json
import os

import diffusers
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

print("diffusers", diffusers.__version__)
torch.manual_seed(0)
width = 16
linears = {
    "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width), "y_embedder.mlp.0": (width, width),
    "y_embedder.mlp.2": (width, width), "context_embedder": (width, width), "final_layer.linear": (16, width),
    "final_layer.adaLN_modulation.1": (2 * width, width), "joint_blocks.0.x_block.attn.qkv": (3 * width, width),
    "joint_blocks.0.x_block.attn.proj": (width, width), "joint_blocks.0.x_block.mlp.fc1": (4 * width, width),
    "joint_blocks.0.x_block.mlp.fc2": (width, 4 * width), "joint_blocks.0.x_block.adaLN_modulation.1": (6 * width, width),
    "joint_blocks.0.context_block.attn.qkv": (3 * width, width),
    "joint_blocks.0.context_block.adaLN_modulation.1": (2 * width, width),
}
tensors = {"pos_embed": torch.randn(1, 64, width), "x_embedder.proj.weight": torch.randn(width, 4, 2, 2)}
tensors |= {"x_embedder.proj.bias": torch.randn(width), "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
weights, scales = {}, {}
for name, shape in linears.items():
    weights[name] = torch.randn(shape) / shape[1] ** 0.5
    scales[name] = weights[name].abs().max() / torch.finfo(torch.float8_e4m3fn).max
    tensors[f"{name}.weight"] = (weights[name] / scales[name]).to(torch.float8_e4m3fn)
    tensors[f"{name}.scale_weight"] = scales[name]
    tensors[f"{name}.bias"] = torch.zeros(shape[0])
save_file(tensors, "sd3.safetensors")
os.mkdir("transformer")
with open("transformer/config.json", "w") as file:
    json.dump({"_class_name": "SD3Transformer2DModel", **small}, file)
model = SD3Transformer2DModel.from_single_file(
    "sd3.safetensors", config=".", subfolder="transformer", local_files_only=True, torch_dtype=torch.float32
)
name = "joint_blocks.0.x_block.attn.proj"
found, right = model.transformer_blocks[0].attn.to_out[0].weight.detach(), weights[name]
times, scaled = float(found.abs().max() / right.abs().max()), float((found * scales[name] - right).abs().max())
print("expected: weight x scale_weight, or an error that says that scales are not read")
print(f"seen: the largest weight is {times:.0f} times too large; with the scale it is off by {scaled:.3f} at most")
assert times > 100 and scaled < 0.1
EOF
