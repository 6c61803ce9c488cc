#!/usr/bin/env bash
# PEFT's adapters initialised by PiSSA or OLoRA are no delta of the base: W + BA is another model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet peft==0.21.2 torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
cd "$work"
"$work/venv/bin/python" - <<'EOF'
import copy
import tempfile

import peft
import torch
from safetensors.torch import load_file

print("peft", peft.__version__)
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
x = torch.randn(4, 8)
found = {}
for init in ("pissa", "olora", True):
    config = peft.LoraConfig(target_modules=["0"], r=2, lora_alpha=2, init_lora_weights=init)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        factors = load_file(directory + "/adapter_model.safetensors")
        a, b = (next(t for name, t in factors.items() if f"lora_{kind}" in name) for kind in "AB")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory)
    with torch.no_grad():
        right, again, plain = model(x), loaded(x), base(x) + x @ a.T @ b.T
        kept = loaded.unload()[0].weight
        pairs = (again, right), (plain, right), (kept, base[0].weight)
        found[init] = [float((one - other).abs().max()) for one, other in pairs]
    print(f"seen: init_lora_weights={init}: off by {found[init][0]:.4f} as PEFT loads it, by {found[init][1]:.4f} as W + BA; "
          f"the base is off by {found[init][2]:.4f} after unload()")
print("expected: alpha / r is 1, so that W + BA is the model, and unload() gives the base back")
assert max(found[True]) < 1e-5
assert all(found[init][0] < 1e-5 and min(found[init][1:]) > 0.05 for init in ("pissa", "olora"))
EOF
