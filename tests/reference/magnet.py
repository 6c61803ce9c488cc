"""MAGNET's losses in PyTorch, written from its description: every mask by itself, no padding, SciPy's matching."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from scipy.optimize import linear_sum_assignment

from seg4diff_jax.models.mask_head import MaskHead
from tests.reference.random_weights import randomize_


def focal_pixels(logits: torch.Tensor, mask: torch.Tensor, *, release: bool, alpha=0.25, gamma=2.0) -> torch.Tensor:
    """torchvision's sigmoid_focal_loss before its mean; `release`: p is the logit in the weight."""
    mask = mask.to(logits.dtype)
    p = logits if release else torch.sigmoid(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    p_t = p * mask + (1 - p) * (1 - mask)
    alpha_t = alpha * mask + (1 - alpha) * (1 - mask)
    return alpha_t * cross_entropy * (1 - p_t) ** gamma


def focal(logits: torch.Tensor, mask: torch.Tensor, *, release: bool = False, **options) -> torch.Tensor:
    return focal_pixels(logits, mask, release=release, **options).mean()


def dice(probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    mask = mask.to(probs.dtype)
    return 1 - (2 * (probs * mask).sum() + 1) / (probs.sum() + mask.sum() + 1)


def upsampled(map_: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return F.interpolate(map_[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


@dataclass(frozen=True)
class Image:
    """What belongs to one image. `maps`: [heads, image tokens, text tokens], scores or probabilities."""

    maps: torch.Tensor
    masks: torch.Tensor
    """bool [masks, H, W], the real ones."""
    places: list[list[int]]
    """Of each mask's class, in the prompt; without classes an empty list."""


def losses(images: list[Image], grid: tuple[int, int], *, release: bool = False, head=None) -> dict[str, torch.Tensor]:
    """From scores: sum over all masks of the batch over their number; `head`: [maps, 1, h, w] to what is added."""
    pairs = []
    for image in images:
        heads, _, text = image.maps.shape
        if image.places:
            maps = refined(image.maps.mean(0).T.reshape(text, *grid), head)
            pairs += [(maps[places].mean(0), mask) for places, mask in zip(image.places, image.masks, strict=True)]
        else:
            maps = refined(image.maps.transpose(1, 2).reshape(heads * text, *grid), head)
            rows, columns = linear_sum_assignment(costs(maps, image.masks, release=release).detach().numpy())
            pairs += [(maps[row], image.masks[column]) for row, column in zip(rows, columns, strict=True)]
    predictions = [(upsampled(map_, mask.shape), mask) for map_, mask in pairs]
    return {
        "focal": sum(focal(x, mask, release=release) for x, mask in predictions) / len(pairs),  # pyright: ignore
        "dice": sum(dice(torch.sigmoid(x), mask) for x, mask in predictions) / len(pairs),  # pyright: ignore
    }


def refined(maps: torch.Tensor, head) -> torch.Tensor:
    return maps if head is None else maps + head(maps[:, None])[:, 0]


def costs(maps: torch.Tensor, masks: torch.Tensor, *, release: bool = False) -> torch.Tensor:
    """0.02 focal + 1.0 dice of every map with every mask, pair by pair, at the maps' resolution."""
    small = F.interpolate(masks[:, None].float(), size=maps.shape[1:], mode="nearest")[:, 0]
    pair = lambda map_, mask: 0.02 * focal(map_, mask, release=release) + dice(torch.sigmoid(map_), mask)
    return torch.stack([torch.stack([pair(map_, mask) for mask in small]) for map_ in maps])


def class_losses(images: list[Image], grid: tuple[int, int], *, gamma: float = 2.0) -> dict[str, torch.Tensor]:
    """From probabilities: torch's log_softmax over the log of each class's upsampled score, on labelled pixels."""
    focals, dices = [], []
    for image in images:
        tokens = image.maps.mean(0).T.reshape(-1, *grid)
        size = image.masks.shape[1:]
        scores = torch.stack([upsampled(tokens[places].mean(0), size) for places in image.places])
        log_q = scores.log().log_softmax(0)
        labelled = image.masks.any(0)
        own = -((1 - log_q.exp()) ** gamma) * log_q * image.masks
        if labelled.any():
            focals.append(own.sum(0)[labelled].mean())
        dices += [dice(q[labelled], mask[labelled]) for q, mask in zip(log_q.exp(), image.masks, strict=True)]
    return {"focal": torch.stack(focals).mean(), "dice": torch.stack(dices).mean()}


def random_masks(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """bool [..., H, W]: rectangles of many sizes."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((int(np.prod(shape[:-2])), *shape[-2:]), bool)
    for mask in masks:
        (top, bottom), (left, right) = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in shape[-2:])
        mask[top:bottom, left:right] = True
    return masks.reshape(shape)


class ReleaseHead(torch.nn.Module):
    """Named as in the release's checkpoints; the caller adds the residual."""

    def __init__(self):
        super().__init__()
        sides = ((1, 64), (64, 64), (64, 1))
        layers = [torch.nn.Conv2d(before, after, 3, padding=1) for before, after in sides]
        first, second, third = layers
        sequence = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), third)
        self.attn_mlp = torch.nn.ModuleDict({"attn_score_layer": sequence})

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.attn_mlp["attn_score_layer"](maps)


def release_head(seed: int = 0) -> ReleaseHead:
    head = ReleaseHead()
    randomize_(head, seed)
    return head


def carried(theirs: ReleaseHead) -> MaskHead:
    """Ours with the same weights."""
    head = MaskHead(rngs=nnx.Rngs(0))
    tensors = dict(theirs.named_parameters())
    for number, layer in zip((0, 2, 4), head.layers, strict=True):
        weight, bias = (tensors[f"attn_mlp.attn_score_layer.{number}.{kind}"].detach() for kind in ("weight", "bias"))
        layer.kernel.set_value(jnp.asarray(weight.permute(2, 3, 1, 0).numpy()))
        layer.bias.set_value(jnp.asarray(bias.numpy()))
    return head
