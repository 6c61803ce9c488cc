"""The pointing game: does the highest point of a class's map lie on the class? (Zhang et al., ECCV 2016)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, UInt8

from seg4diff_jax.bilinear import bilinear_matrix
from seg4diff_jax.segmentation.metrics import IGNORED

ROUNDING = 2.0**-20
"""Of the highest value of a map: eight steps of fp32."""


def pointing_counts(
    scores: Float[Array, "rows grid_rows grid_columns"],
    truth: UInt8[Array, "height width"],
    size: Int[Array, " 2"],
    class_of_row: Int[Array, " rows"],
    classes: int,
) -> Int[Array, "2 classes"]:
    """Counts, of one image, the classes that were pointed at rightly, and those that were tried: each 0 or 1.

    A class is tried if the image has it and the highest pixel of its upsampled map has a label: of a pixel that is
    `IGNORED` nobody knows. Of equals the first pixel in reading order is the highest, and values are equal that
    differ by less than `ROUNDING`: where the highest token lies on an edge, the pixels outside its centre all take its
    value, give or take what a processor's products round. There is no tolerance of place around the point.

    Args:
      scores: class scores on the grid of image tokens; they are upsampled bilinearly, as for label maps.
      truth: labels on a canvas, `IGNORED` past `size`.
      size: height and width of the labels; may be traced.
      class_of_row: the class of each row of scores, `IGNORED` for unused rows.
    """
    height, width = truth.shape
    down, across = bilinear_matrix(scores.shape[1], size[0], height), bilinear_matrix(scores.shape[2], size[1], width)
    inside = (jnp.arange(height) < size[0])[:, None] & (jnp.arange(width) < size[1])

    def pointed(row: tuple[Array, Array]) -> Array:
        grid, label = row
        upsampled = jnp.einsum("hr,rc,wc->hw", down, grid, across, precision="highest")
        highest = jnp.max(upsampled, where=inside, initial=-jnp.inf)
        is_highest = inside & (upsampled >= highest - ROUNDING * jnp.abs(highest))
        found = truth.reshape(-1)[jnp.argmax(is_highest)]
        tried = jnp.any(truth == label) & (label != IGNORED) & (found != IGNORED)
        return jnp.stack([tried & (found == label), tried])

    each = jax.lax.map(pointed, (scores.astype(jnp.float32), class_of_row))
    counts = jnp.zeros((classes, 2), jnp.int32).at[class_of_row].add(each.astype(jnp.int32), mode="drop")
    return counts.T


def pointing_accuracy(counts: Integer[np.ndarray, "2 classes"]) -> Float[np.ndarray, " classes"]:
    """Returns how often each class was pointed at rightly, 0..1; NaN for one that was never tried."""
    hits, tried = counts.astype(np.float64)
    return np.divide(hits, tried, out=np.full(len(hits), np.nan), where=tried > 0)
