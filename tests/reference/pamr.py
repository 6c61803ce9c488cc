"""Pixel-adaptive mask refinement in PyTorch, by the windows that `unfold` makes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def windows(x: torch.Tensor, dilations: tuple[int, ...]) -> torch.Tensor:
    """[maps, height, width] to [maps, dilations, 9, height, width], the pixel itself fifth of the nine."""
    maps, height, width = x.shape
    each = [F.unfold(F.pad(x[None], [dilation] * 4, mode="replicate"), 3, dilation=dilation) for dilation in dilations]
    return torch.stack(each, 1).reshape(len(dilations), maps, 9, height, width).transpose(0, 1)


def refined(pixels: torch.Tensor, scores: torch.Tensor, rounds: int, dilations: tuple[int, ...]) -> torch.Tensor:
    """Colours [3, height, width] and maps [classes, height, width] to refined maps."""
    others = [place for place in range(9) if place != 4]
    colours = windows(pixels, dilations)
    deviation = colours.flatten(1, 2).std(dim=1)
    apart = (colours[:, :, others].flatten(1, 2) - pixels[:, None]).abs() / (0.1 * deviation[:, None] + 1e-8)
    weights = torch.softmax(-apart.mean(dim=0), dim=0)
    for _ in range(rounds):
        scores = (windows(scores, dilations)[:, :, others].flatten(1, 2) * weights).sum(dim=1)
    return scores
