"""Makes batches from labelled images, on the host: reads ahead, makes prompts, and pads arrays to few shapes.

Label maps of any size are padded with the void label to canvases whose sides are powers of two. The number of class
rows is one of few, too, and the last batch is padded. So few programs are compiled, whatever a data set holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from seg4diff_jax.batching import ModelView
from seg4diff_jax.class_grids import as_many_for_each, prior_rows, prompt_rows
from seg4diff_jax.data.crops import View
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.single_objects import SIDE, at_side
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.options import EvaluationResize
from seg4diff_jax.images import ImageError, nearest_aspect, resize, to_model_range
from seg4diff_jax.segmentation.class_prior import ClassPrior
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.text import ClassPrompts

CANVAS = 64
"""Smallest side of a canvas, in pixels."""
CLASS_ROWS = 8
"""Smallest number of class rows."""
WIDE_ROWS = 32
"""Up to here numbers of class rows are powers of two, past it multiples: each row of a vocabulary is upsampled."""
READERS = 4
"""Number of threads that decode images. Pillow lets other threads run while it decodes."""


class Example(NamedTuple):
    """One image as the model sees it, with its labels.

    Attributes:
      index: the image's number in the data set.
      pixels: the image at the size that the model sees.
      labels: labels at their own size, or at that of `data.single_objects`; 255 for pixels that are not counted.
      histogram: number of counted pixels of each class.
      present: classes in the image, ascending: the counted ones, and background if prompts name it without scoring it.
      cut_off: number of pixels that would count, outside the square that the resize `paper` keeps. They have no
        prediction.
    """

    index: int
    name: str
    pixels: Float[np.ndarray, "rows columns 3"]
    labels: UInt8[np.ndarray, "height width"]
    histogram: Int[np.ndarray, " classes"]
    present: tuple[int, ...]
    cut_off: int = 0


class LeftOut(NamedTuple):
    """An image that is not scored.

    Attributes:
      index: the image's number in the data set.
      why: `skipped` if the image cannot be read or has no usable label; `unlabelled` if it has no labelled pixel, so
        that no class can be named in a prompt.
      message: what is wrong with the image, or its name.
      cut_off: as for `Example`.
    """

    index: int
    why: Literal["skipped", "unlabelled"]
    message: str
    cut_off: int = 0


class PromptRows(NamedTuple):
    """The prompts of one pass of the transformer, one prompt per row.

    Attributes:
      texts: the prompts; the last one is repeated as padding.
      image_of_row: for each row the place of its image in the batch.
      averaging: weights of each class's tokens, 0 for padding.
      prior: class prior of each class's words, 1 for padding and without a prior.
    """

    texts: tuple[str, ...]
    image_of_row: Int[np.ndarray, " rows"]
    averaging: Float[np.ndarray, "rows classes tokens"]
    prior: Float[np.ndarray, "rows classes"]


@dataclass(frozen=True)
class EvaluationBatch:
    """Images with their prompts and labels. Rows past the number of `examples` are padding and are not counted.

    Attributes:
      indices: each image's number in the data set, which seeds its noise.
      truth: labels at the images' own sizes, each padded with `IGNORED` to the same canvas.
      sizes: height and width of each image's labels.
      class_of_row: for each image the class of each row of scores, `IGNORED` for unused rows. Several rows may be of
        one class.
    """

    examples: tuple[Example, ...]
    indices: Int[np.ndarray, " images"]
    pixels: Float[np.ndarray, "images rows columns 3"]
    truth: UInt8[np.ndarray, "images height width"]
    sizes: Int[np.ndarray, "images 2"]
    class_of_row: Int[np.ndarray, "images classes"]
    prompts: tuple[PromptRows, ...]

    def as_concepts(self) -> PromptRows:
        """Returns all prompts as one batch of rows: as many for each image, in order, filled up with weight 0."""
        image_of_row, averaging, prior = (
            np.concatenate(each) for each in zip(*(rows[1:] for rows in self.prompts), strict=True)
        )
        (own,) = np.nonzero(averaging.any(axis=(1, 2)))  # no padding
        places, is_own = as_many_for_each(image_of_row[own], len(self.pixels))
        texts, places = [text for rows in self.prompts for text in rows.texts], own[places]
        weights = np.where(is_own[:, None, None], averaging[places], np.float32(0))
        return PromptRows(tuple(texts[place] for place in places), image_of_row[places], weights, prior[places])

    def guessed(self) -> EvaluationBatch:
        """Returns the batch with one row for each class: a guesser does not favour those that have several."""
        rows = self.class_of_row
        earlier = np.tri(rows.shape[1], k=-1, dtype=bool)
        again = ((rows[:, :, None] == rows[:, None, :]) & earlier).any(axis=2)
        return replace(self, class_of_row=np.where(again, IGNORED, rows).astype(np.int32))


class Reader:
    """Reads the examples of a benchmark. A few threads read ahead.

    Args:
      view: the sizes that the model sees.
      how: how images are resized, see `options.EvaluationResize`. With `aspect` an image gets the nearest of
        `images.ASPECTS`, so that there are few sizes.
      skip_unreadable: leave out images that cannot be read or have no usable label.
      ahead: how many images are read ahead.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        view: ModelView,
        *,
        how: EvaluationResize = "square",
        skip_unreadable: bool = False,
        ahead: int = 64,
    ):
        self.benchmark, self.view = benchmark, view
        self.how: EvaluationResize = how
        self.skip_unreadable, self.ahead = skip_unreadable, ahead

    def example(self, index: int) -> Example:
        """Reads one image and its labels. Raises ImageError or FolderError when one of them cannot be used."""
        item = self.benchmark.source[index]
        image, labels = item["image"], item["labels"]
        background, rule = self.benchmark.background, self.benchmark.rule
        whole, how = np.bincount(labels.ravel(), minlength=IGNORED + 1), self.how
        if how == "paper":
            image, labels, how = middle_square(image), middle_square(labels), "square"
        size = self.view.size(nearest_aspect(*image.shape[:2]), None, how)
        pixels = to_model_range(resize(image, size, how))
        if self.benchmark.objects:
            labels = at_side(labels)
            whole = np.bincount(labels.ravel(), minlength=IGNORED + 1)
        inside = np.bincount(labels.ravel(), minlength=IGNORED + 1)
        histogram, outside = (each[: len(self.benchmark.classes)] for each in (inside, whole - inside))
        present = histogram > 0
        if background is not None and rule != "scored":
            labels = np.where(labels == background, np.uint8(IGNORED), labels)
            histogram[background] = outside[background] = 0
            present[background] &= rule == "asked"
        shown = tuple(np.flatnonzero(present).tolist())
        return Example(index, item["name"], pixels, labels, histogram, shown, int(outside.sum()))

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Returns the part of an image that the model sees, at its own resolution; as a square where labels are one.

        Raises as `example` does.
        """
        image = self.benchmark.source[index]["image"]
        if self.benchmark.objects:
            return resize(image, (SIDE, SIDE))
        return middle_square(image) if self.how == "paper" else image

    def read(self, numbers: Iterable[int]) -> Generator[Example | LeftOut, None, None]:
        """Yields the images with these numbers, in order.

        Raises:
          ImageError, FolderError: an image or its label cannot be used, and `skip_unreadable` is False.
        """
        for number, future in ahead_of(numbers, self.example, self.ahead):
            try:
                example = future.result()
            except (ImageError, FolderError) as error:
                if not self.skip_unreadable:
                    hint = "repair or remove the file, or give --skip-unreadable to leave such images out"
                    raise type(error)(f"image {number + 1} of {len(self.benchmark.source)}: {error} ({hint})") from None
                yield LeftOut(number, "skipped", str(error))
                continue
            empty = not example.histogram.any()
            yield LeftOut(number, "unlabelled", example.name, example.cut_off) if empty else example


def middle_square(pixels: Shaped[np.ndarray, "height width *channels"]) -> Shaped[np.ndarray, "side side *channels"]:
    """Returns the square in the middle of an image, as wide as its shorter side."""
    height, width = pixels.shape[:2]
    view = View.of((height, width), "center")
    return pixels[view.top : view.bottom, view.left : view.right]


def ahead_of(
    numbers: Iterable[int], read: Callable[[int], Example], ahead: int
) -> Iterator[tuple[int, Future[Example]]]:
    """Calls `read` for every number in threads, at most `ahead` ahead. Yields the numbers and futures in order."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[tuple[int, Future[Example]]] = deque()
        try:
            for number in numbers:
                waiting.append((number, pool.submit(read, number)))
                if len(waiting) > ahead:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


Asked = Callable[[Example], tuple[tuple[int, ...], ClassPrompts]]
"""Takes an image; returns the class of each row of its scores, and the prompts that have these rows, in order. Rows
past those of the prompts have no words, and score 0."""


def assemble(
    group: Sequence[Example], images: int, asked: Asked | None = None, prior: ClassPrior | None = None
) -> EvaluationBatch:
    """Puts up to `images` examples into one batch, with up to `images` prompts per pass; no prompts without `asked`.

    Raises:
      ValueError: prompts cannot be made from the class names, or the prior lacks a class; the message says why.
    """
    height, width = (_power_of_two(max(example.labels.shape[axis] for example in group), CANVAS) for axis in (0, 1))
    truth = np.full((images, height, width), IGNORED, np.uint8)
    sizes = np.ones((images, 2), np.int32)
    for place, example in enumerate(group):
        sizes[place] = example.labels.shape
        truth[place, : sizes[place, 0], : sizes[place, 1]] = example.labels
    return EvaluationBatch(
        tuple(group),
        _filled(np.array([example.index for example in group], np.int32), images),
        _filled(np.stack([example.pixels for example in group]), images),
        truth,
        sizes,
        *(_questions(group, images, asked, prior) if asked else (np.zeros((images, 0), np.int32), ())),
    )


def asked_otherwise(batch: EvaluationBatch, asked: Asked, prior: ClassPrior | None = None) -> EvaluationBatch:
    """Returns the batch of the same images with other prompts.

    Raises ValueError for classes that the prior lacks.
    """
    class_of_row, prompts = _questions(batch.examples, len(batch.pixels), asked, prior)
    return replace(batch, class_of_row=class_of_row, prompts=prompts)


def _questions(
    group: Sequence[Example], images: int, asked: Asked, prior: ClassPrior | None = None
) -> tuple[Int[np.ndarray, "images classes"], tuple[PromptRows, ...]]:
    found = [asked(example) for example in group]
    rows = class_rows(max(len(classes) for classes, _ in found))
    class_of_row = np.full((images, rows), IGNORED, np.int32)
    for place, (classes, _) in enumerate(found):
        class_of_row[place, : len(classes)] = classes
    return class_of_row, tuple(_prompt_rows([prompts for _, prompts in found], images, rows, prior))


def class_rows(classes: int) -> int:
    """Returns the number of rows of scores for images of up to so many classes, from few numbers: see `WIDE_ROWS`."""
    return _power_of_two(classes, CLASS_ROWS) if classes <= WIDE_ROWS else -(-classes // WIDE_ROWS) * WIDE_ROWS


def _prompt_rows(
    prompts: Sequence[ClassPrompts], count: int, classes: int, prior: ClassPrior | None
) -> Iterator[PromptRows]:
    texts, image_of_row, averaging = prompt_rows(prompts, classes)
    priors = prior_rows(prompts, classes, prior)
    for start in range(0, len(texts), count):
        some = slice(start, start + count)
        own = texts[some]
        texts_of_rows = (*own, *own[-1:] * (count - len(own)))
        owner, weights = (_filled(each[some], count) for each in (image_of_row, averaging))
        yield PromptRows(texts_of_rows, owner, weights, _filled(priors[some], count, value=1))


def _filled(array: np.ndarray, count: int, value: int = 0) -> np.ndarray:
    """Pads an array with a value to `count` rows."""
    if len(array) == count:  # avoids a copy: images are large
        return array
    return np.concatenate([array, np.full((count - len(array), *array.shape[1:]), value, array.dtype)])


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())
