"""Seg4Diff's released zero-shot algorithm, in PyTorch on diffusers: the whole model run, the whole softmax kept."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from PIL import Image

from tests.reference.attention import ExplicitSoftmax

STEPS = 28
T5_TOKENS = 77
SHORTER_SIDE = 640


@dataclass(frozen=True)
class Masks:
    labels: np.ndarray
    """int [H, W], index into the list of names."""
    scores: np.ndarray
    """fp32 [classes, image token rows, image token columns]."""


class Release:
    """Holds a checkpoint in diffusers' format, without T5; one image at a time."""

    def __init__(self, checkpoint: str | Path):
        pipe = StableDiffusion3Pipeline.from_pretrained(
            checkpoint, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
        )
        self.transformer, self.vae = pipe.transformer.eval(), pipe.vae.eval()
        self.tokenizer, self.scheduler = pipe.tokenizer, pipe.scheduler
        self.encode_prompt = pipe.encode_prompt

    @torch.no_grad()
    def segment(
        self,
        pixels: torch.Tensor,
        names: list[str],
        noise: np.ndarray,
        *,
        block: int,
        label_size: tuple[int, int],
        step: int = 8,
    ) -> Masks:
        """
        Args:
          pixels: [1, 3, H, W] in [-1, 1], from `as_they_are` or `squashed`.
          noise: fp32 [H / 8, W / 8, latent channels].
          step: which timestep, counted from the clean end of 28 steps: 1 is the last.
        """
        noisy, timestep = self._noisy_latents(pixels, noise, step)
        patch = self.transformer.config.patch_size
        grid = (noisy.shape[2] // patch, noisy.shape[3] // patch)
        maps = []
        for group in self._prompts(names):
            columns = self._image_to_text(noisy, timestep, " ".join(group), block)
            first = 1
            for name in group:
                end = first + self._token_count(name)
                maps.append(columns[:, first:end].mean(1).reshape(grid))
                first = end
        scores = torch.stack(maps)
        upsampled = F.interpolate(scores[None], size=label_size, mode="bilinear", align_corners=False)[0]
        return Masks(upsampled.argmax(0).cpu().numpy(), scores.float().cpu().numpy())

    def _noisy_latents(self, pixels: torch.Tensor, noise: np.ndarray, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.vae.config
        latents = (self.vae.encode(pixels).latent_dist.mean - config.shift_factor) * config.scaling_factor
        self.scheduler.set_timesteps(STEPS)
        timestep = self.scheduler.timesteps[-step][None].to(latents.device)
        noise_ = torch.from_numpy(np.ascontiguousarray(noise.transpose(2, 0, 1)))[None].to(latents)
        return self.scheduler.scale_noise(latents, timestep, noise_), timestep

    def _image_to_text(self, noisy: torch.Tensor, timestep: torch.Tensor, prompt: str, block: int) -> torch.Tensor:
        """The softmax's columns of the CLIP tokens, mean over heads: [image tokens, CLIP tokens]."""
        options = {"do_classifier_free_guidance": False, "max_sequence_length": T5_TOKENS}
        context, _, pooled, _ = self.encode_prompt(prompt, prompt, prompt, **options)
        assert context is not None
        assert pooled is not None
        attention = self.transformer.transformer_blocks[block].attn
        fused, explicit = attention.processor, ExplicitSoftmax()
        attention.set_processor(explicit)
        self.transformer(noisy, context, pooled, timestep)
        attention.set_processor(fused)
        image_tokens = explicit.probs.shape[-1] - context.shape[1]
        clip_tokens = context.shape[1] - T5_TOKENS
        return explicit.probs[0, :, :image_tokens, image_tokens : image_tokens + clip_tokens].mean(0)

    def _token_count(self, name: str) -> int:
        return len(self.tokenizer(name, add_special_tokens=False).input_ids)

    def _prompts(self, names: list[str]) -> list[list[str]]:
        """As few runs of consecutive names as fit between the start and the end token, the fullest as small as can be.

        The release has one prompt, whatever its length; this is what it should be for a list that is longer.
        """
        counts = [self._token_count(name) for name in names]
        room = self.tokenizer.model_max_length - 2
        fewest = len(_fill(counts, room))
        smallest = next(limit for limit in range(max(counts), room + 1) if len(_fill(counts, limit)) == fewest)
        ends = np.cumsum([0, *_fill(counts, smallest)])
        return [names[start:end] for start, end in pairwise(ends)]


def _fill(counts: list[int], room: int) -> list[int]:
    """How many names each prompt holds when a new one is begun only for a name that does not fit."""
    held, used = [0], 0
    for count in counts:
        if used + count > room:
            held.append(0)
            used = 0
        held[-1] += 1
        used += count
    return held


def as_they_are(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] to fp32 [1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1))[None] / 127.5 - 1


def squashed(image: np.ndarray, side: int) -> torch.Tensor:
    """The release's input: shorter side to 640 by Pillow, then the square by torch, no antialiasing."""
    height, width = image.shape[:2]
    scale = SHORTER_SIDE / min(height, width)
    resized = Image.fromarray(image).resize(
        (int(width * scale + 0.5), int(height * scale + 0.5)), Image.Resampling.BILINEAR
    )
    return F.interpolate(as_they_are(np.asarray(resized)), size=(side, side), mode="bilinear", align_corners=False)
