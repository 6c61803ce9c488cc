"""The guided filter (He, Sun and Tang, 2013): maps that follow the edges of the picture they are of.

In every window a map is fitted as a linear function of the pixel's colour; a pixel takes the mean of the functions of
all windows that it is in. An edge of the picture between two smooth areas becomes an edge of the map.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guide:
    """A pytree of what the filter needs of a picture, whatever the maps.

    Attributes:
      pixels: values of 0..1, less the picture's mean colour.
      mean: of each pixel's window, which ends at the picture's edge.
      inverse: of the window's covariance of colours, the smoothing added to its diagonal.
      radius: windows are 2 x radius + 1 pixels wide. Static.
    """

    pixels: Float[Array, "height width 3"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    mean: Float[Array, "height width 3"] | Any
    inverse: Float[Array, "height width 3 3"] | Any
    radius: int = field(metadata={"static": True})


def guide(pixels: Float[Array, "height width 3"], radius: int, smoothing: float) -> Guide:
    """Makes the guide of a picture.

    Args:
      pixels: values of 0..1.
      radius: of the windows, in pixels.
      smoothing: variance (of values of 0..1) below which a window has no edges.
    """
    centred = pixels - pixels.mean(axis=(0, 1))  # products of small differences round less than those of large values
    mean = window_mean(centred, radius)
    products = window_mean(centred[..., :, None] * centred[..., None, :], radius)
    covariance = products - mean[..., :, None] * mean[..., None, :]
    return Guide(centred, mean, _inverse(covariance + smoothing * jnp.eye(3)), radius)


def _inverse(symmetric: Float[Array, "height width 3 3"]) -> Float[Array, "height width 3 3"]:
    """Returns the inverses of symmetric matrices: their adjugates, over their determinants."""
    first, second, third = (symmetric[..., row, :] for row in range(3))
    adjugate = jnp.stack([jnp.cross(second, third), jnp.cross(third, first), jnp.cross(first, second)], axis=-2)
    determinant = (first * adjugate[..., 0, :]).sum(axis=-1)
    return adjugate / determinant[..., None, None]


def guided(scores: Float[Array, "height width"], by: Guide) -> Float[Array, "height width"]:
    """Filters a map of a picture's pixels."""
    mean = window_mean(scores, by.radius)
    products = window_mean(by.pixels * scores[..., None], by.radius) - by.mean * mean[..., None]
    slope = jnp.einsum("hwij,hwj->hwi", by.inverse, products, precision="highest")
    offset = mean - (slope * by.mean).sum(axis=-1)
    return (window_mean(slope, by.radius) * by.pixels).sum(axis=-1) + window_mean(offset, by.radius)


def window_mean(x: Float[Array, "height width *channels"], radius: int) -> Float[Array, "height width *channels"]:
    """Returns the mean of each pixel's square window, of which what is beyond the picture is left out."""
    for axis in (0, 1):
        window = [1] * x.ndim
        window[axis] = 2 * radius + 1
        padding = [(0, 0)] * x.ndim
        padding[axis] = (radius, radius)
        total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, [1] * x.ndim, padding)
        place = jnp.arange(x.shape[axis])
        count = jnp.minimum(place, radius) + jnp.minimum(x.shape[axis] - 1 - place, radius) + 1
        x = total / count.reshape([-1 if each == axis else 1 for each in range(x.ndim)])
    return x
