"""Resamples bilinearly as PyTorch's `interpolate` with `align_corners=False`, not antialiased, on device and host."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8


def bilinear_matrix(source: int, target: Int[Array, ""] | int, rows: int) -> Float[Array, "rows source"]:
    """Returns the weights along one axis: row i holds those of output pixel i.

    Args:
      source: length of the input.
      target: length of the output; may be traced.
      rows: number of rows. Rows past `target` repeat the border.
    """
    scale = source / jnp.asarray(target, jnp.float32)
    position = jnp.clip((jnp.arange(rows, dtype=jnp.float32) + 0.5) * scale - 0.5, 0, source - 1)
    return jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(source, dtype=jnp.float32)))


def upsampler(source: tuple[int, ...], target: tuple[int, ...]) -> Callable[[Array], Array]:
    """Returns a function that resamples maps [batch, *source] to [batch, *target]. Its weights are made once."""
    down, across = (bilinear_matrix(*sides, rows=sides[1]) for sides in zip(source, target, strict=True))
    return lambda maps: jnp.einsum("hr,brc,wc->bhw", down, maps, across, precision="highest")


def resized_pixels(
    pixels: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]
) -> Float[np.ndarray, "rows columns 3"]:
    """Resamples pixels on the host to another size. Values stay in 0..255 and are not rounded."""
    resampled = pixels.astype(np.float32)
    for axis, target in enumerate(size):
        source = pixels.shape[axis]
        # Positions are fp32, as in PyTorch, whose rounding reaches 1e-4 of a pixel in 640 rows.
        middle = np.arange(target, dtype=np.float32) + np.float32(0.5)
        position = np.clip(middle * np.float32(source / target) - np.float32(0.5), 0, source - 1)
        below = np.floor(position).astype(int)
        above = np.minimum(below + 1, source - 1)
        weight = (position - below.astype(np.float32)).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        resampled = (1 - weight) * resampled.take(below, axis) + weight * resampled.take(above, axis)
    return resampled
