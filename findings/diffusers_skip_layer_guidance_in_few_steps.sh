#!/usr/bin/env bash
# diffusers' skip-layer guidance of SD3.5 silently does nothing in runs of five steps and fewer, as SD3.5-large-turbo's
# four, for no step lies strictly between its defaults of 0.01 and 0.2; and none without classifier-free guidance.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 torch==2.13.0
cd "$work"
"$work/venv/bin/python" - 2>warnings.txt <<'EOF'
import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

print("diffusers", diffusers.__version__)
torch.manual_seed(0)
transformer = SD3Transformer2DModel(
    sample_size=8, num_layers=4, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
    caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
)
for parameter in transformer.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
vae = AutoencoderKL(block_out_channels=(32,), latent_channels=16, shift_factor=0.0)
nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
pipeline = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, **nothing)
pipeline.set_progress_bar_config(disable=True)
prompt = {"prompt_embeds": torch.randn(1, 9, 32), "pooled_prompt_embeds": torch.randn(1, 16)}
prompt |= {f"negative_{name}": torch.randn_like(value) for name, value in prompt.items()}
noise = torch.randn(1, 16, 8, 8)


def changed(steps, guidance):
    """How far skipping two layers moves the latents."""
    made = [
        pipeline(
            **prompt, latents=noise, height=8, width=8, num_inference_steps=steps, guidance_scale=guidance,
            output_type="latent", skip_guidance_layers=skipped,
        ).images
        for skipped in (None, [1, 2])
    ]
    return float((made[0] - made[1]).abs().max())


found = {(steps, guidance): changed(steps, guidance) for steps, guidance in ((28, 5.0), (6, 5.0), (5, 5.0), (4, 5.0), (28, 1.0))}
print("expected: guidance away from a model that skips two layers changes the picture, or is refused")
for (steps, guidance), distance in found.items():
    print(f"seen: {steps} steps, guidance {guidance:g}: the latents move by {distance:.3g}")
assert found[28, 5.0] > 0.01 and found[6, 5.0] > 0.01
assert found[5, 5.0] == found[4, 5.0] == found[28, 1.0] == 0
EOF
