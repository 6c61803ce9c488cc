"""Segments without names: the maps of an empty prompt's tokens, like ones merged (Seg4Diff, unsupervised segmentation).

    attention -> normalised_maps -> log-soft-max over pixels -> divergences -> merge -> upsample, arg-max

All of it works under jit and vmap; thresholds may be traced. How many segments there are depends on the image, so there
are as many rows as tokens, segments first, and a count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seg4diff_jax.segmentation.open_vocabulary import Segmentation, label_map, upsampled_labels

MinMax = Literal["pixel", "token"]
"""What each map is brought to 0..1 over: its own pixels, or each pixel's tokens, as the released Seg4Diff does it."""

MERGE_THRESHOLDS: dict[MinMax, float] = {"pixel": 0.0002, "token": 0.1}
"""Divergences below which maps merge, unless told otherwise.

`token`: what the release's code uses; its configuration says 0.035, which that code never reads. Neither carries over
to `pixel`, whose maps all span 0..1: there it is the best on 1000 training scenes of the miniature
(docs/unsupervised.md). Other models may have another. Two such maps diverge by about half the variance of their
difference, so it merges those that differ by less than 0.02 or so.
"""

THRESHOLD_GRID = tuple(float(f"{0.0001 * 2 ** (step / 2):.2g}") for step in range(23))
"""Thresholds to choose among for another model: 0.0001 to 0.2, each about 1.4 times the one before."""

FLAT = 1e-6
"""Added to what maps are divided by, as in the release: what varies by less is rounding, and stays nearly flat."""


class Segments(NamedTuple):
    """Merged maps of one image.

    Attributes:
      maps: the first `count` are segments, in the order of their first tokens, each a distribution over image tokens
        that sums to 1; rows after them are 0.
      count: how many there are, 1 to the number of tokens.
    """

    maps: Float[Array, "tokens image"]
    count: Int[Array, ""]

    def present(self) -> Bool[Array, " tokens"]:
        return jnp.arange(len(self.maps)) < self.count


@dataclass(frozen=True)
class UnsupervisedSegmentation:
    """One image in segments that have no names.

    Attributes:
      labels: int32 [height, width] of the input image: index into `maps`.
      maps: float32 [segments, rows, columns]: the merged maps, each summing to 1. One may win no pixel.
    """

    labels: Int[np.ndarray, "height width"]
    maps: Float[np.ndarray, "segments rows columns"]

    @property
    def segments(self) -> int:
        return len(self.maps)

    def named(self) -> Segmentation:
        """As segments called `segment 1`, `segment 2` and so on: for all that shows or writes named ones."""
        names = tuple(f"segment {number + 1}" for number in range(self.segments))
        return Segmentation(self.labels, self.maps, names, ("",))


def normalised_maps(attention: Float[Array, "image tokens"], minmax: MinMax) -> Float[Array, "tokens image"]:
    """One map for each token, 0 to 1, fp32; see `MinMax`."""
    maps = attention.astype(jnp.float32).T
    axis = {"token": 0, "pixel": 1}[minmax]
    maps = maps - maps.min(axis=axis, keepdims=True)
    return maps / (maps.max(axis=axis, keepdims=True) + FLAT)


def log_distributions(attention: Float[Array, "image tokens"], minmax: MinMax) -> Float[Array, "tokens image"]:
    """Normalised maps as distributions over image tokens: their logarithms, which stay exact where they are tiny."""
    return jax.nn.log_softmax(normalised_maps(attention, minmax), axis=-1)


def divergences(log_probs: Float[Array, "maps image"]) -> Float[Array, "maps maps"]:
    """Symmetric KL divergence of every pair of distributions: the mean of both directions, in nats.

    Summed up from products of differences: nothing cancels, and equal maps are at exactly 0.
    """
    probs = jnp.exp(log_probs)

    def from_one(one: tuple[Array, Array]) -> Array:
        prob, log_prob = one
        return ((prob - probs) * (log_prob - log_probs)).sum(axis=-1) / 2

    return jax.lax.map(from_one, (probs, log_probs))


def merge(
    probs: Float[Array, "tokens image"],
    divergences: Float[Array, "tokens tokens"],
    threshold: Float[Array, ""] | float,
) -> Segments:
    """Greedy merging: each map that no earlier one has claimed becomes a segment, and claims all that are near it.

    A segment is the mean of all maps that diverge from its first by less than `threshold`, those claimed before
    included. The first is always one of them.
    """
    tokens = len(probs)
    near = (divergences < threshold) | jnp.eye(tokens, dtype=bool)

    def visit(claimed: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        index, group = token
        first = ~claimed[index]
        return claimed | (group & first), first

    _, firsts = jax.lax.scan(visit, jnp.zeros(tokens, bool), (jnp.arange(tokens), near))
    order = jnp.argsort(~firsts, stable=True)
    groups = (near & firsts[:, None])[order].astype(jnp.float32)
    sizes = jnp.maximum(groups.sum(axis=1, keepdims=True), 1)
    return Segments(jnp.matmul(groups, probs, precision="highest") / sizes, firsts.sum(dtype=jnp.int32))


def merged_maps(
    attention: Float[Array, "image tokens"], *, threshold: Float[Array, ""] | float, minmax: MinMax = "pixel"
) -> Segments:
    """From an expert block's image-to-text probabilities, averaged over heads, to merged maps of one image."""
    log_probs = log_distributions(attention, minmax)
    return merge(jnp.exp(log_probs), divergences(log_probs), threshold)


def segment_labels(
    segments: Segments,
    grid: tuple[int, int],
    size: Int[Array, " 2"] | tuple[int, int],
    *,
    canvas: tuple[int, int] | None = None,
) -> Int[Array, "height width"]:
    """The segment whose upsampled map is highest at each pixel.

    Args:
      grid: rows and columns of image tokens.
      size, canvas: as for `label_map`.
    """
    return label_map(segments.maps.reshape(-1, *grid), size, canvas=canvas, present=segments.present())


def check_threshold(threshold: Any, minmax: Any) -> float:
    """The threshold, or for None the default of `minmax`.

    Raises ValueError unless it is a finite number above 0 and `minmax` one of `MinMax`.
    """
    if minmax not in MERGE_THRESHOLDS:
        raise ValueError(f"minmax is {minmax!r}; expected one of {', '.join(MERGE_THRESHOLDS)}")
    chosen = MERGE_THRESHOLDS[minmax] if threshold is None else threshold
    number = isinstance(chosen, int | float | np.number) and not isinstance(chosen, bool)
    if not number or not 0 < chosen < float("inf"):
        raise ValueError(f"threshold is {threshold!r}; expected a number above 0, such as {MERGE_THRESHOLDS[minmax]}")
    return float(chosen)


# ---- for images of any size, on the host -----------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("minmax",))
def merged_maps_of_images(
    attention: Float[Array, "images image tokens"], threshold: Float[Array, ""] | float, minmax: MinMax
) -> tuple[Float[Array, "images tokens image"], Int[Array, " images"]]:
    """`merged_maps` of each image, and how many are segments."""
    segments = jax.vmap(lambda one: merged_maps(one, threshold=threshold, minmax=minmax))(attention)
    return segments.maps, segments.count


def unsupervised_segmentation(
    maps: Float[np.ndarray, "tokens rows columns"], count: int, size: tuple[int, int]
) -> UnsupervisedSegmentation:
    """Labels of an image of `size` (height, width) from its merged maps; one program serves any count."""
    labels = upsampled_labels(maps, size, np.arange(len(maps)) < count)
    return UnsupervisedSegmentation(labels, maps[:count])
