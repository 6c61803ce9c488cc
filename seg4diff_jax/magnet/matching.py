"""Which map stands for which mask: one-to-one bipartite matching of the maps of all heads and tokens with the masks.

On the device and under jit, so that a training step never waits for the host (`optax.assignment`).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from seg4diff_jax.magnet.losses import ALPHA, GAMMA, FocalWeight, focal_terms

FOCAL_COST, DICE_COST = 0.02, 1.0
ROWS, LEAST_AREA = 32, 0.005
HOPELESS = 1e30
"""In place of larger costs and of those that are no numbers, with which the assignment's search would never end."""


def matching_costs(
    logits: Float[Array, "maps rows columns"],
    masks: Bool[Array, "masks rows columns"],
    *,
    focal_cost: float = FOCAL_COST,
    dice_cost: float = DICE_COST,
    alpha: float = ALPHA,
    gamma: float = GAMMA,
    focal: FocalWeight = "sigmoid",
) -> Float[Array, "maps masks"]:
    """focal_cost x focal loss + dice_cost x dice loss of every map with every mask, at the maps' resolution, fp32.

    Sums over the pixels of pairs are products of [maps, pixels] and [pixels, masks]: no array holds all pairs' pixels.
    """
    logits = logits.astype(jnp.float32).reshape(len(logits), -1)
    inside = masks.reshape(len(masks), -1).T.astype(jnp.float32)
    product = partial(jnp.matmul, precision="highest")
    terms = partial(focal_terms, logits, alpha=alpha, gamma=gamma, focal=focal)
    focals = (product(terms(True), inside) + product(terms(False), 1 - inside)) / len(inside)
    probs = jax.nn.sigmoid(logits)
    sizes = probs.sum(axis=1)[:, None] + inside.sum(axis=0)
    dices = 1 - (2 * product(probs, inside) + 1) / (sizes + 1)
    return focal_cost * focals + dice_cost * dices


def match(costs: Float[Array, "maps masks"], real: Bool[Array, " masks"]) -> Int[Array, " masks"]:
    """The map of each mask, no map twice: together the real masks' maps cost the least possible.

    Rows that are not real get maps that are left over. Works under jit and vmap, with costs of any size, infinite and
    NaN too.

    Raises:
      ValueError: there are more rows of masks than maps.
    """
    maps, masks = costs.shape
    if masks > maps:
        raise ValueError(f"{masks} masks cannot each have one of {maps} maps: give each image at most {maps} masks")
    bounded = jnp.clip(jnp.nan_to_num(costs.astype(jnp.float32), nan=HOPELESS), -HOPELESS, HOPELESS)
    # What costs the same with every map changes nothing for the rest.
    rows, chosen = optax.assignment.hungarian_algorithm(jnp.where(real, bounded, 0).T)
    return jnp.zeros(masks, jnp.int32).at[rows].set(chosen.astype(jnp.int32))


def largest_first(
    areas: Int[np.ndarray, " masks"], pixels: int, *, rows: int = ROWS, least: float = LEAST_AREA
) -> Int[np.ndarray, " kept"]:
    """Which of an image's masks are matched, in order: the largest `rows` of those that cover more than `least` of it.

    Args:
      areas: pixels of each mask.
      pixels: of the image.
    """
    order = np.argsort(-areas, kind="stable")
    return order[areas[order] > least * pixels][:rows]


def nearest(masks: Bool[Array, "*batch height width"], size: tuple[int, int]) -> Bool[Array, "*batch rows columns"]:
    """Every mask at another size, by the pixel that PyTorch's `interpolate` picks in its `nearest` mode."""
    rows, columns = (_nearest(*sides) for sides in zip(masks.shape[-2:], size, strict=True))
    return masks[..., rows[:, None], columns]


def _nearest(source: int, target: int) -> Int[np.ndarray, " target"]:
    scale = np.float32(source) / np.float32(target)
    return np.minimum(np.floor(np.arange(target, dtype=np.float32) * scale).astype(int), source - 1)
