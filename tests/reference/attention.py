"""An attention processor for diffusers' SD3 that computes the whole softmax explicitly and keeps it."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel


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
        joint = (self.probs @ v).transpose(1, 2).flatten(2)
        image, text = joint[:, : hidden_states.shape[1]], joint[:, hidden_states.shape[1] :]
        image = attn.to_out[0](image)
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def explicit_softmax(model: SD3Transformer2DModel) -> list[ExplicitSoftmax]:
    """Replace the joint attention of every block; returns the processors, which keep what they computed."""
    processors = []
    for block in model.transformer_blocks:
        block.attn.set_processor(ExplicitSoftmax())
        processors.append(block.attn.processor)
    return processors
