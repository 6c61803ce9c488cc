"""Boundary IoU: the IoU of what lies near the edges of masks (Cheng et al., "Boundary IoU", CVPR 2021).

The band of a class is the part of its mask within a few pixels of the mask's edge. The edge of the image is an edge, as
in the authors' code, and so is the border to pixels without a label. Distances are Chebyshev's: the band is what an
erosion with a square takes away.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from seg4diff_jax.segmentation.metrics import IGNORED

RELATIVE_WIDTH = 0.02
"""Of a band, in lengths of the image's diagonal."""
OUTSIDE = -1


def band_widths(sizes: Integer[np.ndarray, "images 2"]) -> Int[np.ndarray, " images"]:
    """Returns the width of bands in pixels, at least 1, of images with these heights and widths."""
    diagonals = np.hypot(*sizes.T.astype(np.float64))
    return np.maximum(1, np.rint(RELATIVE_WIDTH * diagonals)).astype(np.int32)


def in_bands(
    labels: Integer[Array, "height width"], size: Int[Array, " 2"], width: Int[Array, ""]
) -> Bool[Array, "height width"]:
    """Returns which pixels of a label map lie in the band of their own class.

    These are the pixels that have another label, or the outside of the image, within `width` pixels in a square around
    them. All classes are found at once: the lowest and the highest label of the square are equal elsewhere.

    Args:
      labels: labels from 0 on a canvas; what lies past `size` is outside.
      size: height and width of the image; may be traced, and so may `width`.
    """
    height, across = labels.shape
    inside = (jnp.arange(height) < size[0])[:, None] & (jnp.arange(across) < size[1])
    start = jnp.where(inside, labels.astype(jnp.int32), OUTSIDE)

    def grown(_, extremes):
        low, high = extremes
        return _of_neighbours(low, jnp.minimum), _of_neighbours(high, jnp.maximum)

    low, high = jax.lax.fori_loop(0, width, grown, (start, start))
    return inside & (low != high)


def _of_neighbours(labels: Int[Array, "height width"], extreme) -> Int[Array, "height width"]:
    """Returns the least or greatest label of each pixel and its eight neighbours."""
    padded = jnp.pad(labels, 1, constant_values=OUTSIDE)
    down = extreme(extreme(padded[:-2], padded[1:-1]), padded[2:])
    return extreme(extreme(down[:, :-2], down[:, 1:-1]), down[:, 2:])


def boundary_counts(
    truth: Integer[Array, "height width"],
    predicted: Integer[Array, "height width"],
    size: Int[Array, " 2"],
    width: Int[Array, ""],
    classes: int,
) -> Int[Array, "3 classes"]:
    """Counts the pixels of each class: in the bands of both masks, in the true mask's, in the predicted mask's.

    Pixels whose true label is `IGNORED` are not counted. Add up the counts of many images in int64 on the host.

    Args:
      truth, predicted: labels on a canvas, see `in_bands`. Predictions are classes wherever there is a true one.
      width: of the bands, such as `band_widths`.
    """
    counted = truth != IGNORED
    true_band, own_band = (counted & in_bands(labels, size, width) for labels in (truth, predicted))
    both = true_band & own_band & (truth == predicted)

    def of_class(labels: Array, chosen: Array) -> Array:
        places = jnp.where(chosen, labels.astype(jnp.int32), classes).reshape(-1)
        return jnp.bincount(places, length=classes + 1)[:-1].astype(jnp.int32)

    return jnp.stack([of_class(truth, both), of_class(truth, true_band), of_class(predicted, own_band)])


def boundary_iou(counts: Integer[np.ndarray, "3 classes"]) -> Float[np.ndarray, " classes"]:
    """Returns the boundary IoU of each class, 0..1, over all images; NaN for a class that the truth does not have."""
    both, true, own = counts.astype(np.float64)
    return np.divide(both, true + own - both, out=np.full(len(both), np.nan), where=true > 0)
