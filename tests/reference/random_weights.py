"""Seeded noise for every parameter of a PyTorch module, so that no zero gate or unit norm hides an error."""

from __future__ import annotations

import numpy as np
import torch


def randomize_(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill parameters in place: weights of size 1/sqrt(fan in), norm scales around 1, biases of size 0.1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if name.endswith("bias"):
                value = 0.1 * noise
            elif parameter.ndim <= 1:
                value = 1 + 0.1 * noise
            elif "embed" in name and parameter.ndim == 2 and parameter.shape[0] > parameter.shape[1]:
                value = 0.5 * noise
            else:
                value = noise / np.sqrt(parameter[0].numel())
            parameter.copy_(value.to(parameter.dtype))
    return module.eval()


SD3_QUERIES = ("to_q.weight", "to_q.bias", "add_q_proj.weight", "add_q_proj.bias")


def temper_(module: torch.nn.Module, queries: tuple[str, ...], factor: float) -> None:
    """Divide what makes the queries. T5 does not divide its logits by the root of the head's width: its query weights
    hold that factor; SD3's modulated streams are large before training, and without q and k norms so are its logits.

    Without it the softmax of random weights is so sharp that fp32 rounding alone reaches 1e-5 of the states.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(queries):
                parameter /= factor


def relative_error(ours: np.ndarray, theirs: torch.Tensor | np.ndarray) -> float:
    """Largest absolute difference over the reference's largest absolute value."""
    theirs = theirs.detach().float().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())
