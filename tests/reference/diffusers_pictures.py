"""A picture that diffusers' pipeline makes of a small checkpoint, and ours from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from seg4diff_jax.pipeline import Pipeline

PROMPT = "a photo of a cat on the grass"
STEPS, GUIDANCE, SIDE = 3, 4.0, 64
NOISE = np.random.default_rng(0).standard_normal((SIDE // 8, SIDE // 8, 16), np.float32)


def loaded(directory: Path) -> Any:
    """As the documents load it, with the dtype named, without T5."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        directory, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any) -> np.ndarray:
    """Levels 0 to 255, [side, side, 3]."""
    (picture,) = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(NOISE.transpose(2, 0, 1)[None].copy()),
        height=SIDE,
        width=SIDE,
        max_sequence_length=77,
        output_type="np",
    ).images
    return 255 * picture


def ours(pipe: Pipeline) -> np.ndarray:
    return pipe.generate(PROMPT, steps=STEPS, guidance=GUIDANCE, noise=NOISE, size=(SIDE, SIDE)).astype(np.float32)
