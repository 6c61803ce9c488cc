"""Zero-shot open-vocabulary segmentation: each pixel gets the class whose words it attends to most.

See Seg4Diff, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seg4diff_jax.bilinear import bilinear_matrix


@dataclass(frozen=True)
class Segmentation:
    """The segmentation of one image into named classes.

    Attributes:
      labels: int32 [height, width], at the input image's size: index into `classes` of each pixel.
      scores: float32 [classes, rows, columns]: mean attention of each image token to the class's words.
      classes: the class names, as given.
      prompts: the prompts that the model got; several if the names do not fit in one.
    """

    labels: Int[np.ndarray, "height width"]
    scores: Float[np.ndarray, "classes rows columns"]
    classes: tuple[str, ...]
    prompts: tuple[str, ...]


def class_scores(
    maps: Float[Array, "prompts image text"], averaging: Float[Array, "prompts classes text"]
) -> Float[Array, "prompts classes image"]:
    """Averages the maps of each class's tokens, for each prompt. Classes that the prompt does not name get zero.

    Args:
      maps: image-to-text probabilities of the expert block, averaged over heads.
      averaging: weights that average a class's tokens (`ClassPrompts.averaging`).
    """
    return jnp.einsum("pit,pct->pci", maps, averaging, precision="highest")


def combine_prompts(
    scores: Float[Array, "prompts classes image"], image_of_prompt: Int[Array, " prompts"], images: int
) -> Float[Array, "images classes image"]:
    """Adds up the scores of each image's prompts, without normalising them again.

    A prompt that does not name a class adds zero to it; of a class with names in several prompts each adds its share.
    """
    return jax.ops.segment_sum(scores, image_of_prompt, num_segments=images)


def label_map(
    scores: Float[Array, "classes rows columns"],
    size: Int[Array, " 2"] | tuple[int, int],
    *,
    canvas: tuple[int, int] | None = None,
    present: Bool[Array, " classes"] | None = None,
) -> Int[Array, "height width"]:
    """Returns the class that `best_classes` finds for every pixel."""
    return best_classes(scores, size, canvas=canvas, present=present)[1]


def best_classes(
    scores: Float[Array, "classes rows columns"],
    size: Int[Array, " 2"] | tuple[int, int],
    *,
    canvas: tuple[int, int] | None = None,
    present: Bool[Array, " classes"] | None = None,
) -> tuple[Float[Array, "height width"], Int[Array, "height width"]]:
    """Upsamples class scores bilinearly. Returns each pixel's best score and its class. Ties go to the earlier class.

    Classes are upsampled one after the other, so memory does not grow with their number.

    Args:
      scores: scores on the grid of image tokens.
      size: height and width of the label map; may be traced if `canvas` is given.
      canvas: static height and width of the returned arrays, so that one program serves many sizes. Values past `size`
        have no meaning. Default: `size`.
      present: which classes compete. Default: all.
    """
    height, width = (int(side) for side in size) if canvas is None else canvas
    down = bilinear_matrix(scores.shape[1], size[0], height)
    across = bilinear_matrix(scores.shape[2], size[1], width)

    def compete(best, challenger):
        score, label = best
        grid, index, allowed = challenger
        upsampled = jnp.einsum("hr,rc,wc->hw", down, grid, across, precision="highest")
        wins = allowed & (upsampled > score)
        return (jnp.where(wins, upsampled, score), jnp.where(wins, index, label)), None

    classes = scores.shape[0]
    allowed = jnp.ones(classes, bool) if present is None else present
    start = jnp.full((height, width), -jnp.inf), jnp.zeros((height, width), jnp.int32)
    best, _ = jax.lax.scan(compete, start, (scores.astype(jnp.float32), jnp.arange(classes, dtype=jnp.int32), allowed))
    return best


# ---- on the host, for images and class lists of any size -------------------------------------------------------------

CANVAS = 256
"""Sides of a canvas are multiples of this, so that images of many sizes share few compiled programs."""
CLASS_ROWS = 8
"""Numbers of class rows are multiples of this, so that lists of many lengths share few compiled programs."""

_label_map = jax.jit(label_map, static_argnames=("canvas",))


def padded_rows(classes: int) -> int:
    """Returns the number of rows for that many classes: the next multiple of `CLASS_ROWS`."""
    return -(-classes // CLASS_ROWS) * CLASS_ROWS


def upsampled_labels(
    scores: Float[np.ndarray, "classes rows columns"],
    size: tuple[int, int],
    present: Bool[np.ndarray, " classes"] | None = None,
) -> Int[np.ndarray, "height width"]:
    """Returns the best class of every pixel, on the host. Few compiled programs serve all sizes and class lists.

    Args:
      scores: scores on the grid of image tokens.
      size: height and width of the image.
      present: which classes compete. Default: all.
    """
    canvas = tuple(-(-side // CANVAS) * CANVAS for side in size)
    allowed = np.zeros(padded_rows(len(scores)), bool)
    allowed[: len(scores)] = True if present is None else present
    rows = np.zeros((len(allowed), *scores.shape[1:]), np.float32)
    rows[: len(scores)] = scores
    labels = _label_map(rows, np.asarray(size), canvas=canvas, present=allowed)
    return np.asarray(labels)[: size[0], : size[1]]
