"""A set of images of noise of many sizes, and what is right of it when images are segmented one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.flow import image_noise
from tests.reference.inputs import an_image
from tests.reference.small_tokenizers import WORDS

NAMES = (*dict.fromkeys(WORDS), "zebra crossing", "giraffe")
"""Too many for one prompt."""
SIZES = [(40, 60), (100, 70), (64, 64), (33, 129), (90, 120), (128, 50), (57, 58)]


def write_images(root: Path, sizes: list[tuple[int, int]], crowded: int | None = None, seed: int = 0) -> Path:
    """Images of noise whose labels are stripes of a few classes under a border of ignored pixels."""
    draw = np.random.default_rng(seed)
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(NAMES))
    for index, (height, width) in enumerate(sizes):
        some = np.arange(len(NAMES)) if index == crowded else draw.choice(len(NAMES), 1 + index % 6, replace=False)
        labels = np.broadcast_to(some[np.arange(width) * len(some) // width], (height, width)).astype(np.uint8)
        labels = labels.copy()
        labels[:3] = 255
        Image.fromarray(an_image(height, width, seed + index)).save(root / "images" / f"{index}.png")
        Image.fromarray(labels).save(root / "labels" / f"{index}.png")
    return root


def classes_of(labels: np.ndarray) -> list[int]:
    return [label for label in np.unique(labels).tolist() if label != 255]


def one_by_one(
    pipe: s4d.Pipeline, benchmark: Benchmark, block: int, step: int, sizes: tuple[tuple[int, int], ...]
) -> list[s4d.Segmentation]:
    """Each image by itself, seen at its size and asked for its own classes."""
    found = []
    for index, (rows, columns) in enumerate(sizes):
        item = benchmark.source[index]
        noise = np.asarray(image_noise(5, [index], (rows // 8, columns // 8, 16)))[0]
        names = [benchmark.classes[label] for label in classes_of(item["labels"])]
        found.append(pipe.segment(item["image"], names, block=block, step=step, noise=noise, size=(rows, columns)))
    return found


def pairs_of(benchmark: Benchmark, found: list[s4d.Segmentation]) -> np.ndarray:
    """True and predicted class of every labelled pixel of the set, int [pixels, 2]."""
    pairs = []
    for index, one in enumerate(found):
        truth = benchmark.source[index]["labels"]
        labelled, present = truth != 255, np.array(classes_of(truth))
        pairs.append(np.stack([truth[labelled], present[one.labels][labelled]], axis=-1))
    return np.concatenate(pairs)


def scored(pairs: np.ndarray, classes: int) -> tuple[float, float]:
    """Mean IoU over the classes that occur and pixel accuracy, in percent, by sets of pixels."""
    truth, predicted = pairs.T
    scores = []
    for label in range(classes):
        if (truth == label).any():
            both = np.sum((truth == label) & (predicted == label))
            scores.append(both / np.sum((truth == label) | (predicted == label)))
    return 100 * float(np.mean(scores)), 100 * float(np.mean(truth == predicted))
