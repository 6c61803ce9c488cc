#!/usr/bin/env bash
# Another sampler made of SD3's scheduler by from_config runs at other noise levels: the shift is dropped.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 torch==2.13.0
cd "$work"
"$work/venv/bin/python" - <<'EOF'
import diffusers
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

print("diffusers", diffusers.__version__)
euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
euler.set_timesteps(28)
right = float(euler.sigmas[-9])
found = {}
for sampler in (UniPCMultistepScheduler, DPMSolverMultistepScheduler):
    for how in ({}, {"flow_shift": 3.0}):
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        other = sampler.from_config(euler.config, **flow, **how)
        other.set_timesteps(28)
        found[sampler.__name__, how.get("flow_shift")] = float(other.sigmas[-9])
print(f"expected: the eighth noise level from the end of 28 is {right:.4f}, for it is the model's and not the sampler's")
for (name, shift), sigma in found.items():
    print(f"seen: {sigma:.4f} with {name}, " + ("flow_shift=3.0" if shift else "the shift as from_config takes it over"))
assert abs(right - 0.5151) < 1e-3
assert all((0.28 < sigma < 0.29) if shift is None else (0.54 < sigma < 0.55) for (_, shift), sigma in found.items())
EOF
