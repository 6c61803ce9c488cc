"""One-to-one bipartite matching of the masks with the attention maps of all heads and tokens.

The matching runs on the device and under jit (`optax.assignment`), so a training step never waits for the host.
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
"""Takes the place of larger costs and of NaN, with which the assignment's search would never end."""


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
    """Returns focal_cost x focal loss + dice_cost x dice loss of every map with every mask, at the maps' size, fp32.

    Sums over pixels are matrix products of [maps, pixels] and [pixels, masks], so no array holds the pixels of all
    pairs.
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
    """Assigns a different map to each mask, so that the total cost of the real masks is the least possible.

    Rows that are not real get some of the remaining maps. Works under jit and vmap, and with any costs, infinite and
    NaN too.

    Raises:
      ValueError: there are more rows of masks than maps.
    """
    maps, masks = costs.shape
    if masks > maps:
        raise ValueError(f"{masks} masks cannot each have one of {maps} maps: give each image at most {maps} masks")
    bounded = jnp.clip(jnp.nan_to_num(costs.astype(jnp.float32), nan=HOPELESS), -HOPELESS, HOPELESS)
    # A row with the same cost for every map does not change the assignment of the other rows.
    rows, chosen = optax.assignment.hungarian_algorithm(jnp.where(real, bounded, 0).T)
    return jnp.zeros(masks, jnp.int32).at[rows].set(chosen.astype(jnp.int32))


def largest_first(
    areas: Int[np.ndarray, " masks"], pixels: int, *, rows: int = ROWS, least: float = LEAST_AREA
) -> Int[np.ndarray, " kept"]:
    """Returns the indices of the masks to match, largest first: at most `rows`, each more than `least` of the image.

    Args:
      areas: number of pixels of each mask.
      pixels: number of pixels of the image.
    """
    order = np.argsort(-areas, kind="stable")
    return order[areas[order] > least * pixels][:rows]


def nearest(masks: Bool[Array, "*batch height width"], size: tuple[int, int]) -> Bool[Array, "*batch rows columns"]:
    """Resizes every mask by picking the same pixels as PyTorch's `interpolate` in its `nearest` mode."""
    rows, columns = (_nearest(*sides) for sides in zip(masks.shape[-2:], size, strict=True))
    return masks[..., rows[:, None], columns]


def _nearest(source: int, target: int) -> Int[np.ndarray, " target"]:
    scale = np.float32(source) / np.float32(target)
    return np.minimum(np.floor(np.arange(target, dtype=np.float32) * scale).astype(int), source - 1)
