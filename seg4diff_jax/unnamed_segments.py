"""Segments without names of a batch of images, by any grouping: what is read of the model, and what is made of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from seg4diff_jax.batching import mean_over_seeds
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.passes import NoisedImages, image_vectors, text_maps
from seg4diff_jax.segmentation.grouping import Grouping, segments_of_images, side_by_side
from seg4diff_jax.segmentation.unsupervised import MinMax


def unnamed_segments(
    transformer: MMDiT,
    noised: Sequence[NoisedImages],
    texts: TextConditioning,
    *,
    block: int,
    grouping: Grouping,
    threshold: float,
    minmax: MinMax,
    kernel: Kernel | None = None,
) -> tuple[Float[np.ndarray, "images rows tokens"], Int[np.ndarray, " images"]]:
    """Returns the maps of each image's segments, and how many of the rows are segments.

    Args:
      noised: the images under the noise of each seed, over which attention is averaged. DiffCut compares the features
        of all seeds, side by side.
      texts: empty prompts, one for each image.
    """
    grid = noised[0].grid(transformer.config.patch_size)
    if grouping == "pads":
        seen = mean_over_seeds([text_maps(transformer, one, texts, block=block, kernel=kernel) for one in noised])
    else:
        each = [image_vectors(transformer, one, texts, blocks=(block,), kernel=kernel)[block] for one in noised]
        seen = side_by_side(each)
    segments = segments_of_images(seen, [threshold], grouping=grouping, minmax=minmax, grid=grid)
    return np.asarray(segments.maps)[:, 0], np.asarray(segments.count)[:, 0]
