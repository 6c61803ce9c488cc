"""Makes segments without names (Seg4Diff, unsupervised segmentation): merges similar maps of an empty prompt's tokens.

    attention -> normalised_maps -> log-softmax over pixels -> divergences -> merge -> upsample, arg-max

All of it works under jit and vmap; thresholds may be traced. The number of segments depends on the image. Arrays
therefore have one row for each token, segments first, and a count says how many rows are segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seg4diff_jax.segmentation.open_vocabulary import Segmentation, label_map, upsampled_labels

MinMax = Literal["pixel", "token"]
"""The axis over which maps are scaled to 0..1: each map over its pixels, or each pixel over its tokens.

The released Seg4Diff does the second."""

MERGE_THRESHOLDS: dict[MinMax, float] = {"pixel": 0.0002, "token": 0.1}
"""The default thresholds: maps whose divergence is below the threshold merge.

`token` has the value of the release's code. The release's configuration says 0.035, which that code never reads.
Neither suits `pixel`, where every map spans 0..1. The value for `pixel` is the best on 1000 training scenes of the
miniature (docs/unsupervised.md); other models may need another. The divergence of two such maps is about half the
variance of their difference, so this threshold merges maps that differ by less than about 0.02.
"""

THRESHOLD_GRID = tuple(float(f"{0.0001 * 2 ** (step / 2):.2g}") for step in range(23))
"""Thresholds to try for another model: 0.0001 to 0.2, each about 1.4 times the one before."""

FLAT = 1e-6
"""Added to the divisor of maps, as in the release. A map that varies by less holds only rounding, and stays nearly
flat."""


class Segments(NamedTuple):
    """The merged maps of one image.

    Attributes:
      maps: the first `count` rows are segments, in the order of their first tokens. Each is a distribution over image
        tokens that sums to 1, or of another scale (`segmentation.diffcut`). The other rows are 0.
      count: number of segments, 1 to the number of rows.
    """

    maps: Float[Array, "tokens image"]
    count: Int[Array, ""]

    def present(self) -> Bool[Array, " tokens"]:
        """Returns which rows of `maps` are segments."""
        return jnp.arange(len(self.maps)) < self.count


@dataclass(frozen=True)
class UnsupervisedSegmentation:
    """The segmentation of one image into segments without names.

    Attributes:
      labels: int32 [height, width], at the input image's size: index into `maps` of each pixel.
      maps: float32 [segments, rows, columns]: the merged maps, each with the sum 1; for `diffcut` how much image tokens
        are like the segment, -1 to 1. A segment may have no pixel.
    """

    labels: Int[np.ndarray, "height width"]
    maps: Float[np.ndarray, "segments rows columns"]

    @property
    def segments(self) -> int:
        """Number of segments."""
        return len(self.maps)

    def named(self) -> Segmentation:
        """Returns a `Segmentation` with the names `segment 1`, `segment 2` and so on, to be shown or written."""
        names = tuple(f"segment {number + 1}" for number in range(self.segments))
        return Segmentation(self.labels, self.maps, names, ("",))


def normalised_maps(attention: Float[Array, "image tokens"], minmax: MinMax) -> Float[Array, "tokens image"]:
    """Returns one map for each token, scaled to 0..1 (see `MinMax`); fp32."""
    maps = attention.astype(jnp.float32).T
    axis = {"token": 0, "pixel": 1}[minmax]
    maps = maps - maps.min(axis=axis, keepdims=True)
    return maps / (maps.max(axis=axis, keepdims=True) + FLAT)


def log_distributions(attention: Float[Array, "image tokens"], minmax: MinMax) -> Float[Array, "tokens image"]:
    """Returns the logarithms of the softmax of normalised maps over image tokens.

    Logarithms stay exact where probabilities are tiny.
    """
    return jax.nn.log_softmax(normalised_maps(attention, minmax), axis=-1)


def divergences(log_probs: Float[Array, "maps image"]) -> Float[Array, "maps maps"]:
    """Returns the symmetric KL divergence of every pair of distributions: the mean of both directions, in nats.

    It sums products of differences, so no digits cancel, and equal maps have divergence 0 exactly.
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
    present: Bool[Array, " tokens"] | None = None,
) -> Segments:
    """Merges maps greedily, in the order of tokens.

    A map that no earlier segment has claimed starts a new segment, which claims all maps whose divergence from this
    first map is below `threshold`. The segment's map is the mean of all these maps, even of those that an earlier
    segment has claimed too. The first map is always among them.

    Args:
      present: which rows are maps. Default: all.
    """
    tokens = len(probs)
    present = jnp.ones(tokens, bool) if present is None else present
    near = ((divergences < threshold) | jnp.eye(tokens, dtype=bool)) & present

    def visit(claimed: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        index, group = token
        first = ~claimed[index]
        return claimed | (group & first), first

    _, firsts = jax.lax.scan(visit, ~present, (jnp.arange(tokens), near))
    order = jnp.argsort(~firsts, stable=True)
    groups = (near & firsts[:, None])[order].astype(jnp.float32)
    sizes = jnp.maximum(groups.sum(axis=1, keepdims=True), 1)
    return Segments(jnp.matmul(groups, probs, precision="highest") / sizes, firsts.sum(dtype=jnp.int32))


def merged_maps(
    attention: Float[Array, "image tokens"], *, threshold: Float[Array, ""] | float, minmax: MinMax = "pixel"
) -> Segments:
    """Returns the merged maps of one image.

    Args:
      attention: image-to-text probabilities of the expert block, averaged over heads.
    """
    log_probs = log_distributions(attention, minmax)
    return merge(jnp.exp(log_probs), divergences(log_probs), threshold)


def segment_labels(
    segments: Segments,
    grid: tuple[int, int],
    size: Int[Array, " 2"] | tuple[int, int],
    *,
    canvas: tuple[int, int] | None = None,
) -> Int[Array, "height width"]:
    """Returns, for each pixel, the segment whose upsampled map is highest.

    Args:
      grid: rows and columns of image tokens.
      size, canvas: as for `label_map`.
    """
    return label_map(segments.maps.reshape(-1, *grid), size, canvas=canvas, present=segments.present())


# ---- for images of any size, on the host -----------------------------------------------------------------------------


def unsupervised_segmentation(
    maps: Float[np.ndarray, "tokens rows columns"], count: int, size: tuple[int, int]
) -> UnsupervisedSegmentation:
    """Makes the segmentation of an image from its merged maps. One compiled program serves any count.

    Args:
      count: number of segments in `maps`.
      size: height and width of the image.
    """
    labels = upsampled_labels(maps, size, np.arange(len(maps)) < count)
    return UnsupervisedSegmentation(labels, maps[:count])
