"""Unsupervised scores of many thresholds, and of other protocols, in one pass over labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from seg4diff_jax.data.loader import Item, Source
from seg4diff_jax.images import Resize
from seg4diff_jax.numerics import settled
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.segmentation.open_vocabulary import CANVAS
from seg4diff_jax.segmentation.unsupervised_scores import UnsupervisedProtocol
from seg4diff_jax.segmentation.unsupervised_tally import Truth, UnsupervisedScore, UnsupervisedTally

THRESHOLDS = tuple(float(f"{0.0001 * 2 ** (step / 2):.2g}") for step in range(23))
"""0.0001 to 0.2, each about 1.4 times the one before."""
READERS = 4
"""Threads that decode images: Pillow lets others run meanwhile."""


class LabelledBatch(NamedTuple):
    """Images with their labels; the last repeated to fill up."""

    indices: list[int]
    pixels: Float[np.ndarray, "images rows columns 3"]
    truth: Truth


@settled()
def unsupervised_scores(
    pipe: Pipeline,
    source: Source,
    classes: int,
    protocols: Sequence[UnsupervisedProtocol],
    *,
    block: int | None = None,
    step: int | None = None,
    seed: int = 0,
    resize: Resize = "square",
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda images: None,
) -> list[UnsupervisedScore]:
    """The scores of a set under each protocol, from one forward pass on each image.

    Args:
      source: items with `image` and `labels` 0 to `classes` - 1, or 255; as `data.folder.LabelledFolder` has them.
      block, step, seed: as for `Pipeline.segment`; an image's noise is made of the seed and its number in the set.
      resize: how images come to the trained square: "square" or "release".
      progress: told how many images are done.

    Raises:
      ImageError, FolderError: an image or its labels are not usable.
      ValueError: there are no images or no protocols, or an option is not usable.
      FloatingPointError: attention is not finite: damaged weights.
    """
    if not len(source) or not protocols:
        raise ValueError(f"{len(source)} images and {len(protocols)} protocols: expected at least one of each")
    size = pipe.view.size((0, 0), None, resize)
    grid = size[0] // pipe.view.multiple, size[1] // pipe.view.multiple
    tally, done = UnsupervisedTally(protocols, classes), 0
    for batch in labelled_batches(pipe, source, size, resize, batch_size):
        noise = pipe.view.noise(None, batch.indices, len(source), size, seed)
        attention = pipe.empty_prompt_attention(batch.pixels, noise, block=block, step=step)
        with pipe.settings():
            tally.add(attention, grid, batch.truth)
        done += batch.truth.count
        progress(done)
    return tally.scores()


def at_thresholds(protocol: UnsupervisedProtocol, thresholds: Sequence[float]) -> list[UnsupervisedProtocol]:
    return [replace(protocol, threshold=threshold) for threshold in thresholds]


def best_score(scores: Sequence[UnsupervisedScore]) -> UnsupervisedScore:
    """The first of the highest mean IoU."""
    return max(scores, key=lambda score: np.nan_to_num(score.counts.mean_iou(), nan=-1.0))


def labelled_batches(
    pipe: Pipeline, source: Source, size: tuple[int, int], how: Resize, batch_size: int
) -> Iterator[LabelledBatch]:
    """The images of a set in order, as they are seen at `size`; the next batch is read ahead."""

    def read(index: int) -> tuple[Item, np.ndarray]:
        item = source[index]
        return item, pipe.view.pixels([item["image"]], size, how)[0]

    with ThreadPoolExecutor(READERS) as pool:
        coming = pool.map(read, range(min(batch_size, len(source))))
        for start in range(0, len(source), batch_size):
            some = list(coming)
            following = start + batch_size
            coming = pool.map(read, range(following, min(following + batch_size, len(source))))
            filled = some + some[-1:] * (batch_size - len(some))
            labels = [item["labels"] for item, _ in filled]
            height, width = (-(-max(each.shape[axis] for each in labels) // CANVAS) * CANVAS for axis in (0, 1))
            truth = np.full((batch_size, height, width), IGNORED, np.uint8)
            for place, each in enumerate(labels):
                truth[place, : each.shape[0], : each.shape[1]] = each
            indices = [min(index, len(source) - 1) for index in range(start, following)]
            pixels, sizes = np.stack([seen for _, seen in filled]), np.array([each.shape for each in labels], np.int32)
            yield LabelledBatch(indices, pixels, Truth(len(some), truth, sizes))
