#!/usr/bin/env bash
# torchmetrics documents CLIPScore as max(100 cos, 0) of each picture and caption. Of a batch it is the mean of 100 cos,
# of which the maximum with 0 is taken once: pictures that contradict their captions lower it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torchmetrics==1.9.0 transformers==4.57.6 torch==2.13.0 pillow==13.0.0
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
torch.manual_seed(0)
config = CLIPConfig(
    text_config={**tower, **special}, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16
)
model = CLIPModel(config).eval()
pictures = [torch.randint(256, (3, 32, 32), generator=torch.Generator().manual_seed(i)) for i in range(8)]
captions = ["a cat", "two dogs", "the sea", "zebra", "quiet fox", "bus", "yacht", "jam"]

with torch.no_grad():
    seen = float(clip_score(pictures, captions, lambda: (model, processor)))
    alone = [float(clip_score(p, c, lambda: (model, processor))) for p, c in zip(pictures, captions)]
    inputs = processor(text=captions, images=pictures, return_tensors="pt", padding=True)
    cosines = 100 * torch.nn.functional.cosine_similarity(
        model.get_image_features(inputs["pixel_values"]),
        model.get_text_features(inputs["input_ids"], inputs["attention_mask"]),
    )
expected = float(cosines.clamp(min=0).mean())
print("100 cos of each pair:", ", ".join(f"{value:.1f}" for value in cosines))
print(f"expected: {expected:.4f}, the mean of the scores as they are documented")
print(f"seen: {seen:.4f} of the batch; the mean of the same pairs one by one is {sum(alone) / len(alone):.4f}")
assert cosines.min() < -1 and cosines.max() > 1
assert abs(seen - max(float(cosines.mean()), 0)) < 1e-3 < abs(seen - expected)
assert abs(sum(alone) / len(alone) - expected) < 1e-3
EOF
