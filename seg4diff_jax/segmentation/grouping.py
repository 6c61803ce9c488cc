"""The ways to divide images into segments without names: by the maps of pad tokens, by DiffSeg, or by DiffCut.

Each way makes `Segments` of what one pass shows of a batch of images, at several thresholds at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seg4diff_jax.models.kernels import CHUNK_BYTES
from seg4diff_jax.segmentation.diffseg import diffseg
from seg4diff_jax.segmentation.unsupervised import (
    MERGE_THRESHOLDS,
    THRESHOLD_GRID,
    MinMax,
    Segments,
    divergences,
    log_distributions,
    merge,
)

Grouping = Literal["pads", "diffseg", "diffcut"]
"""By what image tokens are grouped: the maps of an empty prompt's tokens, as in Seg4Diff; image-to-image attention, as
in DiffSeg; features, as in DiffCut."""

THRESHOLDS: dict[Grouping, float] = {"pads": MERGE_THRESHOLDS["pixel"], "diffseg": 0.4, "diffcut": 0.35}
"""The default thresholds: divergences below which maps merge, and normalized cuts below which parts are cut.

Those of DiffSeg and DiffCut are the best on training scenes of the miniature (docs/unsupervised.md); other models may
need others."""

THRESHOLD_GRIDS: dict[Grouping, tuple[float, ...]] = {
    "pads": THRESHOLD_GRID,
    "diffseg": tuple(float(f"{0.05 * 2 ** (step / 2):.2g}") for step in range(11)),
    "diffcut": tuple(round(0.05 * step, 2) for step in range(2, 15)),
}
"""Thresholds to try for another model."""

FEWEST_ROWS = 8
"""Numbers of rows are powers of two from here on, so that few programs are compiled."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ImageVectors:
    """A pytree of the queries and keys of image tokens in one block."""

    q: Float[Array, "images tokens heads head_dim"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    k: Float[Array, "images tokens heads head_dim"] | Any

    def of_head(self, head: int | None) -> ImageVectors:
        """Returns those of one head; None: of all."""
        return self if head is None else jax.tree.map(lambda leaf: leaf[:, :, head : head + 1], self)

    @property
    def features(self) -> Float[np.ndarray, "images tokens channels"]:
        """What DiffCut compares: the keys of all heads, on the host, float32."""
        return np.asarray(self.k.astype(jnp.float32)).reshape(*self.k.shape[:2], -1)


def side_by_side(each: Sequence[ImageVectors]) -> ImageVectors:
    """Returns the vectors of several passes as further heads, so that attention is the mean over passes."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=2), *each)


def segments_of_images(
    seen: Float[Array, "images image tokens"] | ImageVectors,
    thresholds: Sequence[float],
    *,
    grouping: Grouping = "pads",
    minmax: MinMax = "pixel",
    grid: tuple[int, int],
) -> Segments:
    """Returns the segments of each image at each threshold: maps [images, thresholds, rows, image tokens].

    Rows are as many as there are pad tokens, or as DiffSeg and DiffCut found for any image. Damaged weights give maps
    that are not finite.

    Args:
      seen: for `pads` image-to-text probabilities, averaged over heads; for the others the image tokens' vectors.
      minmax: of `pads`, see `MinMax`.
      grid: rows and columns of image tokens.
    """
    below = np.array(thresholds, np.float32)
    if not isinstance(seen, ImageVectors):
        return _merged_pads(seen, below, minmax)
    if grouping == "diffseg":
        found = _diffseg(seen, below, grid)
        return Segments(found.maps[:, :, : rows_for(np.asarray(found.count))], found.count)
    return _diffcut(seen.features, below)


@partial(jax.jit, static_argnames=("minmax",))
def _merged_pads(
    attention: Float[Array, "images image tokens"], thresholds: Float[Array, " thresholds"], minmax: MinMax
) -> Segments:
    def of_image(attention: Array) -> Segments:
        log_probs = log_distributions(attention, minmax)
        probs, apart = jnp.exp(log_probs), divergences(log_probs)
        return jax.lax.map(lambda threshold: merge(probs, apart, threshold), thresholds)

    return jax.vmap(of_image)(attention)


@partial(jax.jit, static_argnames=("grid",))
def _diffseg(vectors: ImageVectors, thresholds: Float[Array, " thresholds"], grid: tuple[int, int]) -> Segments:
    images, tokens, heads, _ = vectors.q.shape
    chunk = min(tokens, max(1, CHUNK_BYTES // (4 * images * heads * tokens)))
    return jax.vmap(lambda q, k: diffseg(q, k, thresholds, grid=grid, chunk=chunk))(vectors.q, vectors.k)


def _diffcut(features: Float[np.ndarray, "images tokens channels"], thresholds: Float[np.ndarray, " _"]) -> Segments:
    from seg4diff_jax.segmentation.diffcut import diffcut  # imports SciPy's eigenvalues, which takes a second

    damaged = [np.full((1, features.shape[1]), np.nan, np.float32)] * len(thresholds)
    each = [diffcut(one, thresholds) if np.isfinite(one).all() else damaged for one in features]
    count = np.array([[len(maps) for maps in of_image] for of_image in each], np.int32)
    maps = np.zeros((*count.shape, rows_for(count), features.shape[1]), np.float32)
    for image, of_image in enumerate(each):
        for place, found in enumerate(of_image):
            maps[image, place, : len(found)] = found
    return Segments(jnp.asarray(maps), jnp.asarray(count))


def rows_for(count: Int[np.ndarray, "*images"]) -> int:
    """Returns how many rows hold any image's segments."""
    return max(FEWEST_ROWS, 1 << (int(count.max()) - 1).bit_length())


def check_threshold(threshold: Any, minmax: Any, grouping: Any = "pads") -> float:
    """Returns the threshold as a float. None: the default of the grouping and, for `pads`, of `minmax`.

    Raises ValueError unless the threshold is a finite number above 0, and below 1 for `diffcut`, `grouping` is one of
    `Grouping`, and `minmax` one of `MinMax`, which only `pads` has a choice of.
    """
    if grouping not in get_args(Grouping):
        raise ValueError(f"grouping is {grouping!r}; expected one of {', '.join(get_args(Grouping))}")
    if minmax not in MERGE_THRESHOLDS:
        raise ValueError(f"minmax is {minmax!r}; expected one of {', '.join(MERGE_THRESHOLDS)}")
    if grouping != "pads" and minmax != "pixel":
        raise ValueError(f"minmax is {minmax!r}, which is of the grouping pads alone: leave it out with {grouping}")
    usual = MERGE_THRESHOLDS[minmax] if grouping == "pads" else THRESHOLDS[grouping]
    chosen = usual if threshold is None else threshold
    number = isinstance(chosen, int | float | np.number) and not isinstance(chosen, bool)
    if not number or not 0 < chosen < float("inf"):
        raise ValueError(f"threshold is {threshold!r}; expected a number above 0, such as {usual}")
    if grouping == "diffcut" and chosen >= 1:
        raise ValueError(
            f"threshold is {threshold!r}; expected below 1, such as {usual}: from 1 on diffcut cuts what is all alike"
        )
    return float(chosen)
