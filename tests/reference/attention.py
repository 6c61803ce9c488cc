"""An attention processor for diffusers' SD3 that computes the whole softmax explicitly and keeps it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from torch.nn import functional


class ExplicitSoftmax:
    """Joint attention by the formula, with scores and probabilities of the joint sequence kept after each call."""

    def __init__(self):
        self.scores: torch.Tensor
        self.probs: torch.Tensor
        self.q: torch.Tensor
        self.k: torch.Tensor
        self.v: torch.Tensor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(hidden_states)), split(attn.to_v(hidden_states))
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            tq = split(attn.add_q_proj(encoder_hidden_states))
            tk = split(attn.add_k_proj(encoder_hidden_states))
            tv = split(attn.add_v_proj(encoder_hidden_states))
            if attn.norm_added_q is not None:
                tq, tk = attn.norm_added_q(tq), attn.norm_added_k(tk)
            q, k, v = torch.cat([q, tq], 2), torch.cat([k, tk], 2), torch.cat([v, tv], 2)
        self.q, self.k, self.v = q, k, v
        self.scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        self.probs = self.scores.softmax(-1)
        joint = (self.mixing(hidden_states.shape[1]) @ v).transpose(1, 2).flatten(2)
        image, text = joint[:, : hidden_states.shape[1]], joint[:, hidden_states.shape[1] :]
        image = attn.to_out[0](image)
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)

    def mixing(self, image_tokens: int) -> torch.Tensor:
        """The weights of the values."""
        return self.probs


@dataclass
class BlurredSoftmax(ExplicitSoftmax):
    """As ExplicitSoftmax, with image-to-text probabilities of some text tokens blurred by PyTorch in some rows."""

    sigma: float
    taps: int
    pad: str
    over: str
    text_tokens: tuple[int, int]
    rows: list[bool]
    grid: tuple[int, int]

    def mixing(self, image_tokens: int) -> torch.Tensor:
        mixing = self.probs.clone()
        columns = slice(image_tokens + self.text_tokens[0], image_tokens + self.text_tokens[1])
        maps = mixing[self.rows, :, :image_tokens, columns]
        if self.over == "text":
            blurred = self.blurred(maps)
        else:
            plane = maps.unflatten(2, self.grid)
            for axis in (2, 3):
                plane = self.blurred(plane.movedim(axis, -1)).movedim(-1, axis)
            blurred = plane.flatten(2, 3)
            blurred *= maps.sum(-1, keepdim=True) / blurred.sum(-1, keepdim=True)
        mixing[self.rows, :, :image_tokens, columns] = blurred
        return mixing

    def blurred(self, x: torch.Tensor) -> torch.Tensor:
        """Along the last axis."""
        reach = self.taps // 2
        distances = torch.arange(self.taps) - reach
        weights = torch.exp(-0.5 * (distances / self.sigma) ** 2).to(x.dtype)
        rows = x.flatten(0, -2)[:, None]
        if self.pad == "reflect":
            padded = functional.pad(rows, (reach, reach), mode="reflect")
        else:
            padded = torch.cat([rows[..., :reach].flip(-1), rows, rows[..., rows.shape[-1] - reach :].flip(-1)], -1)
        return functional.conv1d(padded, (weights / weights.sum())[None, None]).reshape(x.shape)


def explicit_softmax(model: SD3Transformer2DModel) -> list[ExplicitSoftmax]:
    """Replace the joint attention of every block; returns the processors, which keep what they computed."""
    processors = []
    for block in model.transformer_blocks:
        block.attn.set_processor(ExplicitSoftmax())
        processors.append(block.attn.processor)
    return processors
