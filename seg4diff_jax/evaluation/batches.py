"""From labelled images to arrays of few shapes, on the host: reading ahead, prompts, canvases.

Label maps of any sizes lie on canvases whose sides are powers of two, surrounded by the ignored label; classes stand in
a power of two of rows; the last batch is filled up. So the compiled programs are few whatever a data set holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from seg4diff_jax.batching import ModelView
from seg4diff_jax.data.crops import View
from seg4diff_jax.data.labelled import FolderError
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.options import EvaluationResize
from seg4diff_jax.images import ImageError, nearest_aspect, resize, to_model_range
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.text import ClassPrompts, Tokenizers, class_prompts

CANVAS = 64
"""Least side of a canvas."""
CLASS_ROWS = 8
"""Least number of class rows."""
READERS = 4
"""Threads that decode images: Pillow lets others run meanwhile."""


class Example(NamedTuple):
    """One image as the model sees it.

    Attributes:
      labels: at their own size; 255 for what does not count.
      histogram: how many pixels that count each class has.
      present: classes that the image is known to show, ascending: those that count, and the background where its name
        is asked for all the same.
      cut_off: pixels that would count, but lie outside the square that `paper` sees: they have no prediction.
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
      why: `skipped` for one that cannot be read or has no usable label; `unlabelled` for one without a labelled pixel,
        of which nothing could be asked.
      message: what is wrong with it, or its name.
      cut_off: as of `Example`.
    """

    index: int
    why: Literal["skipped", "unlabelled"]
    message: str
    cut_off: int = 0


class PromptRows(NamedTuple):
    """As many prompts as one pass of the transformer takes.

    Attributes:
      texts: the prompts; the last is repeated to fill up.
      image_of_row: which image of the batch each is for.
      averaging: weights of each class's tokens, 0 for what fills up.
    """

    texts: tuple[str, ...]
    image_of_row: Int[np.ndarray, " rows"]
    averaging: Float[np.ndarray, "rows classes tokens"]


@dataclass(frozen=True)
class EvaluationBatch:
    """Images with their prompts and labels; rows past the number of `examples` fill up and count for nothing.

    Attributes:
      indices: each image's number in the data set, of which its noise is made.
      truth: labels at the images' own sizes on one canvas, `IGNORED` around them.
      class_of_row: for each image the class that each row of scores stands for, `IGNORED` for none.
    """

    examples: tuple[Example, ...]
    indices: Int[np.ndarray, " images"]
    pixels: Float[np.ndarray, "images rows columns 3"]
    truth: UInt8[np.ndarray, "images height width"]
    sizes: Int[np.ndarray, "images 2"]
    class_of_row: Int[np.ndarray, "images classes"]
    prompts: tuple[PromptRows, ...]


class Reader:
    """The examples of a benchmark; a few threads read ahead.

    Args:
      view: how the model sees images.
      how: they come to its size, see `options.EvaluationResize`; of aspects the nearest of `images.ASPECTS` is
        kept, so that there are few sizes.
      ahead: how many images are read before their turn.
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
        """Raises ImageError or FolderError when the image or its label is not usable."""
        item = self.benchmark.source[index]
        image, labels = item["image"], item["labels"]
        background, rule = self.benchmark.background, self.benchmark.rule
        whole, how = np.bincount(labels.ravel(), minlength=IGNORED + 1), self.how
        if how == "paper":
            image, labels, how = middle_square(image), middle_square(labels), "square"
        size = self.view.size(nearest_aspect(*image.shape[:2]), None, how)
        pixels = to_model_range(resize(image, size, how))
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
        """What is seen of an image, at its own resolution. Raises as `example` does."""
        image = self.benchmark.source[index]["image"]
        return middle_square(image) if self.how == "paper" else image

    def read(self, numbers: Iterable[int]) -> Generator[Example | LeftOut, None, None]:
        """The images of these numbers, in order.

        Raises ImageError or FolderError, unless such images are to be skipped.
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
    """The square as wide as the shorter side, in the middle."""
    height, width = pixels.shape[:2]
    view = View.of((height, width), "center")
    return pixels[view.top : view.bottom, view.left : view.right]


def ahead_of(
    numbers: Iterable[int], read: Callable[[int], Example], ahead: int
) -> Iterator[tuple[int, Future[Example]]]:
    """What `read` makes of every number, in order, with up to `ahead` of them under way."""
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
"""The classes that an image is asked for, ascending, and their prompts."""


class PresentClasses:
    """The paper's protocol: an image is asked for the names of the classes that its label holds, and no others.

    Args:
      names: what each class is called.
      repeats: classes may share a name, and are then told apart by its places in the prompt alone.
    """

    name = "present"

    def __init__(self, tokenizers: Tokenizers, names: Sequence[str], *, repeats: bool = False):
        @lru_cache(4096)
        def prompts(present: tuple[int, ...]) -> ClassPrompts:
            return class_prompts(tokenizers, [names[index] for index in present], repeats=repeats)

        self._prompts = prompts

    def __call__(self, example: Example) -> tuple[tuple[int, ...], ClassPrompts]:
        """The classes that are asked for, ascending, and their prompts."""
        return example.present, self._prompts(example.present)


class AllClasses:
    """Every image is asked for the whole vocabulary, packed into as few prompts as hold it.

    Args:
      without: a class whose name is not asked for.
      names, repeats: as for `PresentClasses`.
    """

    name = "all"

    def __init__(
        self, tokenizers: Tokenizers, names: Sequence[str], *, without: int | None = None, repeats: bool = False
    ):
        self.classes = tuple(index for index in range(len(names)) if index != without)
        self.prompts = class_prompts(tokenizers, [names[index] for index in self.classes], repeats=repeats)

    def __call__(self, example: Example) -> tuple[tuple[int, ...], ClassPrompts]:
        return self.classes, self.prompts


def questions(benchmark: Benchmark, tokenizers: Tokenizers, prompts: Sequence[str]) -> dict[str, Asked]:
    """Who asks, for each of `present` and `all` that is named.

    Raises ValueError when class names do not make prompts.
    """
    repeats = benchmark.names == "release"
    makers: dict[str, Callable[[], Asked]] = {
        "present": lambda: PresentClasses(tokenizers, benchmark.prompts, repeats=repeats),
        "all": lambda: AllClasses(
            tokenizers,
            benchmark.prompts,
            without=benchmark.background if benchmark.rule == "ignored" else None,
            repeats=repeats,
        ),
    }
    return {name: makers[name]() for name in prompts}


def assemble(group: Sequence[Example], images: int, asked: Asked | None = None) -> EvaluationBatch:
    """Up to `images` examples in one batch, and as many prompts a pass; none where nothing is asked for.

    Raises ValueError when class names do not make prompts; the message says why.
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
        *(_questions(group, images, asked) if asked else (np.zeros((images, 0), np.int32), ())),
    )


def asked_otherwise(batch: EvaluationBatch, asked: Asked) -> EvaluationBatch:
    """The same images with other prompts."""
    class_of_row, prompts = _questions(batch.examples, len(batch.pixels), asked)
    return replace(batch, class_of_row=class_of_row, prompts=prompts)


def _questions(
    group: Sequence[Example], images: int, asked: Asked
) -> tuple[Int[np.ndarray, "images classes"], tuple[PromptRows, ...]]:
    found = [asked(example) for example in group]
    rows = _power_of_two(max(len(classes) for classes, _ in found), CLASS_ROWS)
    class_of_row = np.full((images, rows), IGNORED, np.int32)
    for place, (classes, _) in enumerate(found):
        class_of_row[place, : len(classes)] = classes
    return class_of_row, tuple(_prompt_rows([prompts for _, prompts in found], images, rows))


def _prompt_rows(prompts: Sequence[ClassPrompts], count: int, classes: int) -> Iterator[PromptRows]:
    texts = [text for each in prompts for text in each.prompts]
    image_of_row = np.repeat(np.arange(len(prompts), dtype=np.int32), [len(each.prompts) for each in prompts])
    averaging = np.concatenate([each.averaging(classes) for each in prompts])
    for start in range(0, len(texts), count):
        some = slice(start, start + count)
        own = texts[some]
        yield PromptRows(
            (*own, *own[-1:] * (count - len(own))), _filled(image_of_row[some], count), _filled(averaging[some], count)
        )


def _filled(array: np.ndarray, count: int) -> np.ndarray:
    """With zeros, to `count` rows."""
    if len(array) == count:  # images are too large to be copied for nothing
        return array
    return np.concatenate([array, np.zeros((count - len(array), *array.shape[1:]), array.dtype)])


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())
