"""Measures how many images per second one process reads for `evaluate.py`, by stage, on the host and without a model.

    python benchmarks/decode.py                              # to 1024 px, SD3-medium's; --size 512
    python benchmarks/decode.py --images 8 --repeats 1       # quicker

Writes pictures and labels in the layouts, sizes and file formats of three published sets (smooth noise, with about as
many bytes as photographs), and reads them with the evaluator's reader. Stages are timed in one thread by processor
time, which other programs on the machine hardly change. `reader/s` is images per second, in wall time, of the threads
that read ahead while batches are put together. Files are in the page cache. Target: 50 images/s.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from jsonargparse import auto_cli
from PIL import Image, features
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from seg4diff_jax.batching import ModelView
from seg4diff_jax.convert.sources.open import MINIATURE
from seg4diff_jax.data.labelled import LabelledImages, read_fitting
from seg4diff_jax.evaluation.batches import READERS, Example, Reader, assemble
from seg4diff_jax.evaluation.benchmarks import Benchmark, open_benchmark
from seg4diff_jax.evaluation.options import Data
from seg4diff_jax.evaluation.vocabulary import PresentClasses, Vocabulary
from seg4diff_jax.images import resize, to_model_range
from seg4diff_jax.text import Tokenizers

TARGET = 50.0
CLASSES_SHOWN = 5


class Layout(NamedTuple):
    """Where a set has its files, how large its pictures are, and what its label files hold.

    Attributes:
      size: width and height in pixels.
      grain: how strong the pixels' own noise is, of 255: it decides about the number of bytes.
    """

    image: str
    label: str
    size: tuple[int, int]
    ids: tuple[int, ...]
    grain: float
    listing: str = ""
    palette: bool = False


LAYOUTS = {
    "voc20": Layout(
        "VOCdevkit/VOC2012/JPEGImages/{:06d}.jpg",
        "VOCdevkit/VOC2012/SegmentationClass/{:06d}.png",
        (500, 375),
        (0, 1, 8, 15, 20),
        18,
        "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
        True,
    ),
    "coco-171": Layout(
        "val2017/{:012d}.jpg", "stuffthingmaps/val2017/{:012d}.png", (640, 480), (0, 16, 61, 168, 181), 20
    ),
    "cityscapes19": Layout(
        "leftImg8bit/val/city/city_{:06d}_leftImg8bit.png",
        "gtFine/val/city/city_{:06d}_gtFine_labelIds.png",
        (2048, 1024),
        (7, 8, 11, 21, 26),
        1,
    ),
}


def main(size: int = 1024, images: int = 32, batch: int = 4, repeats: int = 3) -> None:
    """Measure.

    Args:
      size: side of the square that the model sees.
      images: of each set.
      batch: images that are put together.
      repeats: how often all are read; the best counts.
    """
    tokenizers = Tokenizers(*(AutoTokenizer.from_pretrained(MINIATURE / name) for name in ("tokenizer", "tokenizer_2")))
    table = Table(title=f"to {size} x {size} pixels; processor milliseconds an image in one thread")
    stages = ("label", "picture", "resize", "to -1..1", "presence", "batch")
    columns = ("set", "pixels", "KiB", *stages, "sum", "longest", "reader/s")
    for column in columns:
        table.add_column(column, justify="left" if column in ("set", "pixels", "longest") else "right", no_wrap=True)
    for name, layout in LAYOUTS.items():
        with tempfile.TemporaryDirectory(prefix="decode-") as work:
            kilobytes = write_set(Path(work), layout, images)
            benchmark = open_benchmark(Data(name=name, root=work), size)
            reader = Reader(benchmark, ModelView(size, 16, size, 8, 16), ahead=2 * batch)
            asked = PresentClasses(Vocabulary.of(benchmark, tokenizers))
            seconds = one_thread(reader, benchmark, size, repeats)
            examples = [reader.example(index) for index in range(min(batch, images))]
            together = best(lambda e=examples, a=asked: assemble(e, batch, a), repeats, time.thread_time)
            seconds["batch"] = together / len(examples)
            reading = best(lambda r=reader, a=asked: read_all(r, images, batch, a), repeats, time.perf_counter)
        table.add_row(
            name,
            "{} x {}".format(*layout.size),
            f"{kilobytes:.0f}",
            *(f"{1000 * seconds[stage]:.1f}" for stage in stages),
            f"{1000 * sum(seconds.values()):.1f}",
            max(seconds, key=seconds.__getitem__),
            f"{images / reading:.1f}",
        )
    console = Console(width=136, highlight=False)
    console.print(table)
    jpeg = (
        f"libjpeg-turbo {features.version_feature('libjpeg_turbo')}" if features.check("libjpeg_turbo") else "libjpeg"
    )
    console.print(
        f"target: {TARGET:.0f} images/s; {READERS} threads; Pillow {PIL.__version__}, {jpeg}, numpy {np.__version__}"
    )
    load = f"load {os.getloadavg()[0]:.1f}"
    console.print(f"{platform.machine()}, {os.cpu_count()} cores, {load}; {datetime.now():%Y-%m-%d %H:%M}")


def write_set(root: Path, layout: Layout, images: int) -> float:
    """Pictures and labels where the set has them; returns the mean size of a picture's file in KiB."""
    rng, sizes, width, height = np.random.default_rng(0), [], *layout.size
    for number in range(images):
        picture, label = (root / place.format(number) for place in (layout.image, layout.label))
        for file in (picture, label):
            file.parent.mkdir(parents=True, exist_ok=True)
        channels = [smooth(rng, width, height) for _ in range(3)]
        pixels = 127 + 60 * np.stack(channels, -1) + layout.grain * rng.standard_normal((height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(picture, quality=90)
        best_of = np.argmax([smooth(rng, width, height, octaves=3) for _ in range(CLASSES_SHOWN)], axis=0)
        values = Image.fromarray(np.asarray(layout.ids, np.uint8)[best_of])
        if layout.palette:
            values.putpalette([37 * place % 256 for place in range(768)])
        values.save(label)
        sizes.append(picture.stat().st_size / 1024)
    if layout.listing:
        listing = root / layout.listing
        listing.parent.mkdir(parents=True)
        listing.write_text("".join(f"{Path(layout.image.format(number)).stem}\n" for number in range(images)))
    return float(np.mean(sizes))


def smooth(rng: np.random.Generator, width: int, height: int, octaves: int = 6) -> np.ndarray:
    """fp32 [height, width] of size about 1: noise on grids from coarse to fine, the finer the weaker."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        cells = rng.standard_normal((3 << octave, 4 << octave)).astype(np.float32)
        total += np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)) / 1.6**octave
    return total


def one_thread(reader: Reader, benchmark: Benchmark, size: int, repeats: int) -> dict[str, float]:
    """Seconds an image of what `Reader.example` does, one thing at a time."""
    source = benchmark.source
    assert isinstance(source, LabelledImages)
    numbers, clock = range(len(source)), time.thread_time
    labels = [source.labels(index) for index in numbers]
    pictures = [source[index]["image"] for index in numbers]
    square = [resize(picture, (size, size)) for picture in pictures[:4]]
    fitting = lambda index: read_fitting(source.images[index], labels[index].shape, source.labels.place(index))
    work: dict[str, Callable[[int], object]] = {
        "label": source.labels,
        "picture": fitting,
        "resize": lambda index: resize(pictures[index], (size, size)),
        "to -1..1": lambda index: to_model_range(square[index % len(square)]),
    }
    seconds = {name: best(lambda do=do: [do(index) for index in numbers], repeats, clock) for name, do in work.items()}
    whole = best(lambda: [reader.example(index) for index in numbers], repeats, clock)
    each = {name: taken / len(numbers) for name, taken in seconds.items()}
    return each | {"presence": max(0.0, whole / len(numbers) - sum(each.values()))}


def read_all(reader: Reader, images: int, batch: int, asked: PresentClasses) -> None:
    """As the evaluator does it: threads read ahead while batches are put together."""
    group: list[Example] = []
    for example in reader.read(range(images)):
        assert isinstance(example, Example)
        group.append(example)
        if len(group) == batch:
            assemble(group, batch, asked)
            group = []


def best(work: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of the quickest repetition, by that clock."""
    seconds = []
    for _ in range(repeats):
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)


if __name__ == "__main__":
    auto_cli(main)
