"""Zero-shot open-vocabulary segmentation: which class's words does each image token attend to? (Seg4Diff, section 3)"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seg4diff_jax.bilinear import bilinear_matrix


@dataclass(frozen=True)
class Segmentation:
    """Where each class is in one image.

    Attributes:
      labels: int32 [height, width] of the input image: index into `classes`.
      scores: float32 [classes, rows, columns]: mean attention of each image token to the class's words.
      classes: the class names, as given.
      prompts: what the model was told; more than one when the names do not fit a prompt.
    """

    labels: Int[np.ndarray, "height width"]
    scores: Float[np.ndarray, "classes rows columns"]
    classes: tuple[str, ...]
    prompts: tuple[str, ...]


def class_scores(
    maps: Float[Array, "prompts image text"], averaging: Float[Array, "prompts classes text"]
) -> Float[Array, "prompts classes image"]:
    """Mean of each class's token columns, per prompt; zero for classes that the prompt does not name.

    Args:
      maps: image-to-text probabilities of the expert block, averaged over heads.
      averaging: rows that average a class's tokens (`ClassPrompts.averaging`).
    """
    return jnp.einsum("pit,pct->pci", maps, averaging, precision="highest")


def combine_prompts(
    scores: Float[Array, "prompts classes image"], image_of_prompt: Int[Array, " prompts"], images: int
) -> Float[Array, "images classes image"]:
    """Scores of each image's prompts side by side, not renormalised; one prompt of an image names each class."""
    return jax.ops.segment_sum(scores, image_of_prompt, num_segments=images)


def label_map(
    scores: Float[Array, "classes rows columns"],
    size: Int[Array, " 2"] | tuple[int, int],
    *,
    canvas: tuple[int, int] | None = None,
    present: Bool[Array, " classes"] | None = None,
) -> Int[Array, "height width"]:
    """Upsample class scores bilinearly and take the best class of every pixel; ties go to the earlier class.

    Classes are taken one after the other, so memory does not grow with their number.

    Args:
      scores: on the grid of image tokens.
      size: height and width of the label map; may be traced if `canvas` is given.
      canvas: static height and width of the array that holds it (what lies past `size` is meaningless), so that one
        program serves many sizes. Default: `size`.
      present: classes that compete. Default: all.
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
    (_, labels), _ = jax.lax.scan(
        compete, start, (scores.astype(jnp.float32), jnp.arange(classes, dtype=jnp.int32), allowed)
    )
    return labels


# ---- on the host, for images and class lists of any size -------------------------------------------------------------

CANVAS = 256
"""Label maps are made on canvases of multiples of this, so that images of many sizes share few programs."""
CLASS_ROWS = 8
"""Classes are counted in multiples of this, so that lists of many lengths share few programs."""

_label_map = jax.jit(label_map, static_argnames=("canvas",))


def padded_rows(classes: int) -> int:
    """Rows to hold that many classes in: the next multiple of `CLASS_ROWS`."""
    return -(-classes // CLASS_ROWS) * CLASS_ROWS


def upsampled_labels(
    scores: Float[np.ndarray, "classes rows columns"],
    size: tuple[int, int],
    present: Bool[np.ndarray, " classes"] | None = None,
) -> Int[np.ndarray, "height width"]:
    """The best class, of those `present` if given, of every pixel of an image of `size` (height, width)."""
    canvas = tuple(-(-side // CANVAS) * CANVAS for side in size)
    allowed = np.zeros(padded_rows(len(scores)), bool)
    allowed[: len(scores)] = True if present is None else present
    rows = np.zeros((len(allowed), *scores.shape[1:]), np.float32)
    rows[: len(scores)] = scores
    labels = _label_map(rows, np.asarray(size), canvas=canvas, present=allowed)
    return np.asarray(labels)[: size[0], : size[1]]
