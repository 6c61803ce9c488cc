"""Which prediction stands for which mask, read from one block's captured image-to-text maps.

COCO: the prompt is the names of the classes whose masks there are, so a class's map is that of its tokens. SA-1B: masks
have no names, so each is matched with the map that is most like it, of all heads and tokens.
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
"""Maps of an image that the mask head refines at a time: its hidden layers are 64 times as large as a map."""


def class_maps(
    maps: Float[Array, "batch image text"],
    averaging: Float[Array, "batch masks text"],
    grid: tuple[int, int],
    head: MaskHead | None = None,
) -> Float[Array, "batch masks rows columns"]:
    """Mean of each class's token maps; zero for rows of `averaging` that name no class.

    Args:
      maps: of the CLIP tokens, mean over heads: scores, or probabilities.
      averaging: `text.ClassPrompts.averaging` of each image's one prompt, or `averaging_of_ids`.
      grid: rows x columns of image tokens.
      head: refines each token's map, before the mean.
    """
    if head is not None:
        tokens = jnp.swapaxes(maps, 1, 2).reshape(maps.shape[0], -1, *grid)
        maps = jnp.swapaxes(_refine(head, tokens).reshape(*tokens.shape[:2], -1), 1, 2)
    return class_scores(maps, averaging).reshape(maps.shape[0], -1, *grid)


def averaging_of_ids(
    prompt: Int[Array, "batch tokens"], names: Int[Array, "batch masks name_tokens"]
) -> tuple[Float[Array, "batch masks tokens"], Bool[Array, "batch masks"]]:
    """The release's `class_maps` weights: a class averages every token of the prompt whose id occurs in its name.

    Names that share a word share its places: `traffic light` and `light` both average both. `ClassPrompts.averaging`
    keeps each name to its own.

    Args:
      prompt: CLIP-L's token ids.
      names: each name's ids without start and end token; -1 fills up shorter ones and rows without a class.

    Returns:
      weights, and whether any place was found: the release leaves out the masks of classes without (names that the
      prompt's end cut off), so its real masks are those that also have this.
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
    """Each mask's map, found by one-to-one matching over heads and tokens (`matching`); gradients flow to it alone.

    Rows that are not real get maps that no mask wants. With a head, maps are matched and returned as it refines them.

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
    """A few maps at a time, again in the backward pass."""
    refined = jax.lax.map(jax.checkpoint(lambda maps: head(maps)), jnp.swapaxes(maps, 0, 1), batch_size=MAPS_AT_ONCE)
    return jnp.swapaxes(refined, 0, 1)
