"""Compares our masks with those of the released algorithm in PyTorch on diffusers: miniature, same scenes and noise.

    PYTHONPATH=. python benchmarks/released_algorithm.py                 # the 500 test scenes
    PYTHONPATH=. python benchmarks/released_algorithm.py --scenes 20 --model DIR

Both compute in fp32, each with its own text encoders and autoencoder. The release runs one image at a time through all
blocks and keeps one block's whole attention matrix. Ours runs batches and stops at the block. Both warm up before they
are timed. Prints mIoU of both, the share of pixels with equal labels, the largest difference of scores, and images/s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table

import seg4diff_jax as s4d
from seg4diff_jax.convert.sources.open import MINIATURE
from seg4diff_jax.flow import image_noise
from seg4diff_jax.miniature.world.shapes import CLASSES, Scene, scene
from seg4diff_jax.segmentation.metrics import confusion_matrix, mean_iou
from tests.reference.release import Release, as_they_are


def main(
    model: str = "miniature",
    scenes: int = 500,
    split: str = "test",
    batch: int = 25,
    step: int | None = None,
    seed: int = 0,
) -> None:
    """Compare.

    Args:
      model: directory in diffusers' format, or the shipped miniature.
      scenes: how many of the split's, from the first.
      split: train, validation or test.
      batch: images at once, ours only.
      step: noise level, from the clean end of 28. Default: the checkpoint's own.
      seed: of the noise.
    """
    console = Console(highlight=False)
    pipe = s4d.load(model, dtype="float32")
    release = Release(MINIATURE if model == "miniature" else model)
    step = pipe.expert_step if step is None else step
    shown = [scene(split, index, pipe.trained_size) for index in range(scenes)]
    factor = pipe.vae.config.downsampling
    latent = (pipe.trained_size // factor, pipe.trained_size // factor, pipe.vae.config.latent_channels)
    noise = np.asarray(image_noise(seed, range(scenes), latent))
    names = [[CLASSES[index] for index in each.classes] for each in shown]

    def ours() -> Iterator[s4d.Segmentation]:
        for start in range(0, scenes, batch):
            part = slice(start, start + batch)
            images = [each.image for each in shown[part]]
            yield from pipe.segment(images, names[part], step=step, noise=noise[part])

    def theirs() -> Iterator[s4d.Segmentation]:
        for each, classes, eps in zip(shown, names, noise, strict=True):
            size = each.labels.shape
            yield release.segment(
                as_they_are(each.image), classes, eps, block=pipe.expert_block, label_size=size, step=step
            )

    results, seconds = {}, {}
    for name, run in {"seg4diff_jax": ours, "released algorithm": theirs}.items():
        warm_up = run()
        for _ in range(batch if name == "seg4diff_jax" else 1):
            next(warm_up)
        start = time.perf_counter()
        results[name] = list(track(run(), name, total=scenes, console=Console(stderr=True)))
        seconds[name] = time.perf_counter() - start

    table = Table("", "mIoU %", "images/s", title=f"{scenes} {split} scenes, block {pipe.expert_block}, step {step}")
    for name, masks in results.items():
        table.add_row(name, f"{miou(shown, masks):.3f}", f"{scenes / seconds[name]:.2f}")
    console.print(table)
    pairs = list(zip(*results.values(), strict=True))
    equal = np.mean([np.mean(mine.labels == other.labels) for mine, other in pairs])
    worst = max(float(np.abs(mine.scores - other.scores).max() / other.scores.max()) for mine, other in pairs)
    console.print(f"equal labels on {100 * equal:.4f} % of pixels; scores differ by at most {worst:.1e} of the largest")
    console.print(f"torch {torch.__version__} on {torch.get_num_threads()} threads")


def miou(scenes: list[Scene], masks: list) -> float:
    total = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for each, found in zip(scenes, masks, strict=True):
        predicted = np.asarray(each.classes)[found.labels]
        total += np.asarray(confusion_matrix(each.labels, predicted, len(CLASSES)))
    return 100 * mean_iou(total)


if __name__ == "__main__":
    auto_cli(main)
