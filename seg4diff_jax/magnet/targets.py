"""Chooses the prediction for each mask from one block's captured image-to-text maps.

COCO: the prompt is the names of the image's classes, so a class's map is the mean of its tokens' maps. SA-1B: masks
have no names, so each mask is matched with the map most like it, among all heads and tokens.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seg4diff_jax.magnet.losses import ALPHA, GAMMA, FocalWeight
from seg4diff_jax.magnet.matching import DICE_COST, FOCAL_COST, match, matching_costs, nearest
from seg4diff_jax.models.mask_head import MaskHead
from seg4diff_jax.segmentation.open_vocabulary import class_scores

MAPS_AT_ONCE = 32
"""How many maps the mask head refines at a time. The head's hidden layers are 64 times as large as a map."""


def class_maps(
    maps: Float[Array, "batch image text"],
    averaging: Float[Array, "batch masks text"],
    grid: tuple[int, int],
    head: MaskHead | None = None,
) -> Float[Array, "batch masks rows columns"]:
    """Returns the mean of each class's token maps; zero for rows of `averaging` that name no class.

    Args:
      maps: scores or probabilities of the CLIP tokens, mean over heads.
      averaging: `text.ClassPrompts.averaging` of each image's one prompt, or `averaging_of_ids`.
      grid: rows and columns of image tokens.
      head: refines each token's map, before the mean.
    """
    if head is not None:
        tokens = jnp.swapaxes(maps, 1, 2).reshape(maps.shape[0], -1, *grid)
        maps = jnp.swapaxes(_refine(head, tokens).reshape(*tokens.shape[:2], -1), 1, 2)
    return class_scores(maps, averaging).reshape(maps.shape[0], -1, *grid)


def averaging_of_ids(
    prompt: Int[Array, "batch tokens"], names: Int[Array, "batch masks name_tokens"]
) -> tuple[Float[Array, "batch masks tokens"], Bool[Array, "batch masks"]]:
    """Returns weights for `class_maps` as in the release: a class averages all prompt tokens whose id is in its name.

    Names that share a word share the positions of that word: in a prompt with `traffic light` and `light`, both classes
    average both `light` tokens. With `ClassPrompts.averaging` each class averages only its own words.

    Args:
      prompt: CLIP-L's token ids.
      names: token ids of each name without start and end token; -1 pads shorter names and rows without a class.

    Returns:
      weights, and whether any token was found. No token is found if the end of the prompt cut the name off. The release
      leaves the masks of such classes out, so they must not count as real.
    """
    places = (prompt[:, None, :, None] == names[:, :, None, :]).any(axis=-1)
    count = places.sum(axis=-1, keepdims=True)
    return places / jnp.maximum(count, 1).astype(jnp.float32), count[..., 0] > 0


def matched_maps(
    scores: Float[Array, "batch heads image text"],
    masks: Bool[Array, "batch masks height width"],
    real: Bool[Array, "batch masks"],
    grid: tuple[int, int],
    head: MaskHead | None = None,
    *,
    focal_cost: float = FOCAL_COST,
    dice_cost: float = DICE_COST,
    alpha: float = ALPHA,
    gamma: float = GAMMA,
    focal: FocalWeight = "sigmoid",
) -> Float[Array, "batch masks rows columns"]:
    """Returns each mask's map, found by one-to-one matching over heads and tokens (`matching`).

    Gradients flow to the matched maps alone. Rows that are not real get some of the remaining maps. With a head, both
    the matching and the result use the maps that the head has refined.

    Raises:
      ValueError: there are more rows of masks than maps.
    """
    costs = partial(matching_costs, focal_cost=focal_cost, dice_cost=dice_cost, alpha=alpha, gamma=gamma, focal=focal)
    batch, heads, _, text = scores.shape
    candidates = jnp.swapaxes(jax.lax.stop_gradient(scores), 2, 3).reshape(batch, heads * text, *grid)
    if head is not None:
        candidates = jax.lax.stop_gradient(_refine(head, candidates))
    chosen = jax.vmap(match)(jax.vmap(costs)(candidates, nearest(masks, grid)), real)
    take = jax.vmap(lambda scores, chosen: scores[chosen // text, :, chosen % text])
    found = take(scores, chosen).reshape(batch, -1, *grid)
    return found if head is None else _refine(head, found)


def _refine(head: MaskHead, maps: Float[Array, "batch maps rows columns"]) -> Float[Array, "batch maps rows columns"]:
    """Refines `MAPS_AT_ONCE` maps at a time, and computes them again in the backward pass, to save memory."""
    refined = jax.lax.map(jax.checkpoint(lambda maps: head(maps)), jnp.swapaxes(maps, 0, 1), batch_size=MAPS_AT_ONCE)
    return jnp.swapaxes(refined, 0, 1)
