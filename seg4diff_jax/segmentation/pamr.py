"""Pixel-adaptive mask refinement (PAMR): neighbours of like colour agree (Araslanov and Roth, arXiv 2005.07969).

Each round replaces a map's value at a pixel by a weighted mean of its neighbours', near and far. Weights are the
softmax of how alike their colours are, in parts of how much the colours around the pixel vary. The constants are those
of the released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DILATIONS = (1, 2, 4, 8, 12, 24)
"""Pixels between a pixel and its neighbours: eight of them at each dilation, in a window of 3 x 3."""
SHARPNESS = 10.0
"""Factor of the colours' differences, over their standard deviation."""
SMALL = 1e-8
"""Added to a tenth of the standard deviation, which is 0 where all colours are equal."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affinities:
    """A pytree of what the rounds need of a picture, whatever the maps: 48 numbers for each pixel.

    Attributes:
      weights: of each pixel's neighbours; they sum to 1.
      rounds: how often maps are averaged. Static.
    """

    weights: Float[Array, "neighbours height width"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    rounds: int = field(metadata={"static": True})


def neighbours(x: Float[Array, "height width *channels"]) -> Iterator[Float[Array, "height width *channels"]]:
    """Yields what each pixel's neighbours have, in turn. Beyond the picture lie copies of its outermost pixels."""
    most, (height, width) = max(DILATIONS), x.shape[:2]
    padded = jnp.pad(x, [(most, most), (most, most)] + [(0, 0)] * (x.ndim - 2), mode="edge")
    for dilation, down, across in product(DILATIONS, (-1, 0, 1), (-1, 0, 1)):
        if down or across:
            top, left = most + dilation * down, most + dilation * across
            yield padded[top : top + height, left : left + width]


def affinities(pixels: Float[Array, "height width 3"], rounds: int) -> Affinities:
    """Makes the affinities of a picture.

    Args:
      pixels: values on any scale: only their differences count, in parts of each other.
    """
    # Each window of 3 x 3 has the pixel itself in its middle. The deviation is that of a sample, as PyTorch's is.
    windows, count = len(DILATIONS), 9 * len(DILATIONS)
    mean = (sum(neighbours(pixels)) + windows * pixels) / count
    squares = sum((each - mean) ** 2 for each in neighbours(pixels)) + windows * (pixels - mean) ** 2
    scale = SMALL + jnp.sqrt(squares / (count - 1)) / SHARPNESS
    alike = jnp.stack([-(jnp.abs(each - pixels) / scale).mean(axis=-1) for each in neighbours(pixels)])
    return Affinities(jax.nn.softmax(alike, axis=0), rounds)


def averaged(scores: Float[Array, "height width"], by: Affinities) -> Float[Array, "height width"]:
    """Refines a map of a picture's pixels. Its values stay within their range; a constant map stays as it is."""
    once = lambda scores: sum(weight * values for weight, values in zip(by.weights, neighbours(scores), strict=True))
    return jax.lax.fori_loop(0, by.rounds, lambda _, scores: once(scores), scores)
