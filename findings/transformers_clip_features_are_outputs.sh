#!/usr/bin/env bash
# transformers 5's CLIPModel.get_image_features and get_text_features return an output object and no tensor, in which the
# projected vectors go by the name pooler_output. torchmetrics' newest CLIPScore, which allows transformers 5, fails on it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torchmetrics==1.9.0 transformers==5.24.0 torch==2.13.0 pillow==13.0.0
cd "$work"
"$work/venv/bin/python" - 2>warnings.txt <<'EOF'
import json

import torch
import torchmetrics
import transformers
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

print("torchmetrics", torchmetrics.__version__, "transformers", transformers.__version__)
letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
with open("vocab.json", "w") as file:
    json.dump({token: number for number, token in enumerate(tokens)}, file)
with open("merges.txt", "w") as file:
    file.write("#version: 0.2\n")
tokenizer = CLIPTokenizer("vocab.json", "merges.txt", model_max_length=77)
processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer)
tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
special = {"vocab_size": len(tokens), "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
config = CLIPConfig(
    text_config={**tower, **special}, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16
)
model = CLIPModel(config).eval()
picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
pixels = processor(images=[picture], return_tensors="pt")["pixel_values"]
with torch.no_grad():
    features = model.get_image_features(pixels)
    projected = model.visual_projection(model.vision_model(pixels).pooler_output)
print("expected: get_image_features returns the projected vectors, a tensor [1, 16], as transformers 4 does")
print(f"seen: {type(features).__name__}, whose pooler_output is {list(features.pooler_output.shape)}")
assert not isinstance(features, torch.Tensor)
assert torch.equal(features.pooler_output, projected)
try:
    clip_score(picture, "a cat", lambda: (model, processor))
    raise SystemExit("torchmetrics has a score")
except AttributeError as error:
    print(f"seen: torchmetrics' clip_score: AttributeError: {error}")
EOF
