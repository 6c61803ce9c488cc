"""Zero-shot open-vocabulary segmentation: each pixel gets the class whose words it attends to most.

See Seg4Diff, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seg4diff_jax.bilinear import bilinear_matrix, upsampler
from seg4diff_jax.segmentation.guided_filter import Guide, guide, guided
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions
from seg4diff_jax.segmentation.pamr import Affinities, affinities, averaged

Edges = Guide | Affinities
"""What of a picture makes maps follow its edges: the guided filter, or PAMR."""


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
    edges: Edges | None = None,
) -> Int[Array, "height width"]:
    """Returns the class that `best_classes` finds for every pixel."""
    return best_classes(scores, size, canvas=canvas, present=present, edges=edges)[1]


def best_classes(
    scores: Float[Array, "classes rows columns"],
    size: Int[Array, " 2"] | tuple[int, int],
    *,
    canvas: tuple[int, int] | None = None,
    present: Bool[Array, " classes"] | None = None,
    edges: Edges | None = None,
) -> tuple[Float[Array, "height width"], Int[Array, "height width"]]:
    """Upsamples class scores bilinearly. Returns each pixel's best score and its class. Ties go to the earlier class.

    Classes are upsampled one after the other, so memory does not grow with their number.

    Args:
      scores: scores on the grid of image tokens.
      size: height and width of the label map; may be traced if `canvas` is given.
      canvas: static height and width of the returned arrays, so that one program serves many sizes. Values past `size`
        have no meaning. Default: `size`.
      present: which classes compete. Default: all.
      edges: makes scores follow the edges of this picture, at its size, before they come to `size`. Default: none.
    """
    height, width = (int(side) for side in size) if canvas is None else canvas
    source = scores.shape[1:] if edges is None else size_of(edges)
    down = bilinear_matrix(source[0], size[0], height)
    across = bilinear_matrix(source[1], size[1], width)
    to_picture = None if edges is None else upsampler(scores.shape[1:], source)

    def compete(best, challenger):
        score, label = best
        grid, index, allowed = challenger
        if edges is not None and to_picture is not None:
            grid = along(edges, to_picture(grid[None])[0])
        upsampled = jnp.einsum("hr,rc,wc->hw", down, grid, across, precision="highest")
        wins = allowed & (upsampled > score)
        return (jnp.where(wins, upsampled, score), jnp.where(wins, index, label)), None

    classes = scores.shape[0]
    allowed = jnp.ones(classes, bool) if present is None else present
    start = jnp.full((height, width), -jnp.inf), jnp.zeros((height, width), jnp.int32)
    best, _ = jax.lax.scan(compete, start, (scores.astype(jnp.float32), jnp.arange(classes, dtype=jnp.int32), allowed))
    return best


def size_of(edges: Edges) -> tuple[int, int]:
    """Returns the height and width of the picture whose edges they are."""
    height, width = edges.pixels.shape[:2] if isinstance(edges, Guide) else edges.weights.shape[1:]
    return height, width


def along(edges: Edges, scores: Float[Array, "height width"]) -> Float[Array, "height width"]:
    """Makes a map of a picture's pixels follow the picture's edges."""
    return guided(scores, edges) if isinstance(edges, Guide) else averaged(scores, edges)


# ---- on the host, for images and class lists of any size -------------------------------------------------------------

CANVAS = 256
"""Sides of a canvas are multiples of this, so that images of many sizes share few compiled programs."""
CLASS_ROWS = 8
"""Numbers of class rows are multiples of this, so that lists of many lengths share few compiled programs."""


def edges_of(pixels: Float[Array, "height width 3"], grid: tuple[int, int], masks: MaskOptions) -> Edges | None:
    """Returns what the options ask for to follow edges; None if they ask for nothing.

    Args:
      pixels: what the model sees, values of -1..1.
      grid: rows and columns of image tokens.
    """
    if not masks.follow_edges:
        return None
    pixels = pixels.astype(jnp.float32) / 2 + 0.5
    if masks.edge_rounds:
        return affinities(pixels, masks.edge_rounds)
    radius = max(1, round(masks.edge_radius * pixels.shape[0] / grid[0]))
    return guide(pixels, radius, masks.edge_smoothing)


@partial(jax.jit, static_argnames=("canvas", "masks"))
def _label_map(
    scores: Float[Array, "classes rows columns"],
    size: Int[Array, " 2"],
    pixels: Float[Array, "seen_rows seen_columns 3"] | np.ndarray | None,
    *,
    canvas: tuple[int, int],
    present: Bool[Array, " classes"],
    masks: MaskOptions,
) -> Int[Array, "height width"]:
    grid = scores.shape[1], scores.shape[2]
    edges = None if pixels is None else edges_of(jnp.asarray(pixels), grid, masks)
    return label_map(scores, size, canvas=canvas, present=present, edges=edges)


def padded_rows(classes: int) -> int:
    """Returns the number of rows for that many classes: the next multiple of `CLASS_ROWS`."""
    return -(-classes // CLASS_ROWS) * CLASS_ROWS


def upsampled_labels(
    scores: Float[np.ndarray, "classes rows columns"],
    size: tuple[int, int],
    present: Bool[np.ndarray, " classes"] | None = None,
    masks: MaskOptions = PAPERS_MASKS,
    pixels: Float[np.ndarray, "seen_rows seen_columns 3"] | None = None,
) -> Int[np.ndarray, "height width"]:
    """Returns the best class of every pixel, on the host. Few compiled programs serve all sizes and class lists.

    Args:
      scores: scores on the grid of image tokens.
      size: height and width of the image.
      present: which classes compete. Default: all.
      masks, pixels: whether scores follow the edges of the image as the model sees it, values of -1..1.
    """
    canvas = tuple(-(-side // CANVAS) * CANVAS for side in size)
    allowed = np.zeros(padded_rows(len(scores)), bool)
    allowed[: len(scores)] = True if present is None else present
    rows = np.zeros((len(allowed), *scores.shape[1:]), np.float32)
    rows[: len(scores)] = scores
    pixels = pixels if masks.follow_edges else None
    labels = _label_map(rows, np.asarray(size), pixels, canvas=canvas, present=allowed, masks=masks)
    return np.asarray(labels)[: size[0], : size[1]]
