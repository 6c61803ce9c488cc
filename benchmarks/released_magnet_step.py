"""The released code's MAGNET training step, rewritten on diffusers and PEFT from its description; see `magnet_step`."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import diffusers
import numpy as np
import peft
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig

RATE, DECAY, CLIP_NORM = 1e-4, 1e-4, 0.01
SHIFT = 3.0


class KeptScores:
    """Joint attention, fused; the whole matrix of scores is made beside it and kept."""

    scores: torch.Tensor

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any = None) -> Any:
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        image = [split(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v)]
        of_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = [split(project(encoder_hidden_states)) for project in of_text]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
        self.scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        joint = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = hidden_states.shape[1]
        return attn.to_out[0](joint[:, :tokens]), attn.to_add_out(joint[:, tokens:])


class ReleasedStep:
    """Call it for a step. Weights are fp32; on a GPU products are fp16, by autocast with a scaled loss."""

    def __init__(
        self,
        transformer: dict[str, Any],
        vae: dict[str, Any],
        scaling: float,
        inputs: dict[str, np.ndarray],
        *,
        block: int,
        rank: int,
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        levels = len(vae["block_out_channels"])
        with self.device:
            self.model = SD3Transformer2DModel(**transformer).requires_grad_(False)
            self.vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=vae["block_out_channels"],
                layers_per_block=vae["layers_per_block"],
                latent_channels=vae["latent_channels"],
                shift_factor=vae["shift"],
                scaling_factor=scaling,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ).requires_grad_(False)
            targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
            self.model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        self.kept = KeptScores()
        self.model.transformer_blocks[block].attn.set_processor(self.kept)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=DECAY)
        self.cuda = self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.cuda)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        self.inputs = {name: tensor.to(self.device) for name, tensor in tensors.items() if name != "latents"}

    def __call__(self) -> None:
        with torch.autocast("cuda", torch.float16) if self.cuda else nullcontext():
            loss = self.loss()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        assert math.isfinite(loss.item())

    def loss(self) -> torch.Tensor:
        with torch.no_grad():
            pixels = self.inputs["image"].permute(0, 3, 1, 2).float() / 127.5 - 1
            config = self.vae.config
            latents = (self.vae.encode(pixels).latent_dist.mean - config.shift_factor) * config.scaling_factor
        noise = torch.randn_like(latents)
        uniform = torch.sigmoid(0.5 * torch.randn(len(latents), device=self.device))
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        level = sigma[:, None, None, None]
        noisy = (1 - level) * latents + level * noise
        context, pooled = self.inputs["context"], self.inputs["pooled"]
        velocity = self.model(noisy, context, pooled, 1000 * sigma).sample
        return F.mse_loss(velocity.float(), (noise - latents).float()) + self.mask_loss(latents.shape[2:])

    def mask_loss(self, latent: torch.Size) -> torch.Tensor:
        """0.1 focal + 0.2 dice of every class's mean map at the masks' size."""
        grid = (latent[0] // 2, latent[1] // 2)
        tokens, text = grid[0] * grid[1], self.inputs["averaging"].shape[2]
        maps = self.kept.scores[:, :, :tokens, tokens : tokens + text].float().mean(1)
        logits = torch.einsum("bit,bmt->bmi", maps, self.inputs["averaging"]).unflatten(-1, grid)
        masks = self.inputs["masks"].float()
        logits = F.interpolate(logits, size=masks.shape[2:], mode="bilinear", align_corners=False).flatten(2)
        masks = masks.flatten(2)
        probs = logits.sigmoid()
        weight = torch.where(masks > 0, 0.25 * (1 - probs) ** 2, 0.75 * probs**2)
        focal = (weight * F.binary_cross_entropy_with_logits(logits, masks, reduction="none")).mean(-1)
        dice = 1 - (2 * (probs * masks).sum(-1) + 1) / (probs.sum(-1) + masks.sum(-1) + 1)
        return 0.1 * focal.mean() + 0.2 * dice.mean()

    def peak(self) -> float | None:
        """GiB of the GPU's memory; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None

    def matmul_peak(self) -> float:
        """Operations a second of a product of large square matrices, the best of some."""
        side, dtype = (8192, torch.float16) if self.cuda else (2048, torch.float32)
        matrix, seconds = torch.randn(side, side, device=self.device, dtype=dtype), []
        for _ in range(8):
            begun = time.perf_counter()
            matrix @ matrix
            if self.cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        return 2 * side**3 / min(seconds)

    def versions(self) -> str:
        where = torch.cuda.get_device_name() if self.cuda else f"{torch.get_num_threads()} threads"
        return f"torch {torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__} on {where}"
