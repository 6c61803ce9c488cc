"""Compares readings of the expert block's attention, with MAGNET's adapters and without, on the miniature.

    python benchmarks/magnet_readouts.py "[RUN/export,ANOTHER/export]" [--scenes 128]

Three readings of the same maps are scored on validation scenes. The prompt of a scene names its own classes:

    probabilities   arg-max of the head-mean softmax over all keys, as in zero-shot segmentation
    scores          arg-max of the head-mean q.k/sqrt(d)
    sigmoid         sigmoid(head-mean score) > 1/2, for each class by itself, which `masks_from: scores` trains
"""

from __future__ import annotations

import numpy as np
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table

import seg4diff_jax as s4d
from seg4diff_jax.bilinear import bilinear_matrix
from seg4diff_jax.miniature.world.shapes import CLASSES, scene
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.segmentation.metrics import mean_iou
from seg4diff_jax.text import class_prompts

READINGS = ("probabilities", "scores", "sigmoid")


def main(adapters: list[str], scenes: int = 128, model: str = "miniature") -> None:
    """Print the table.

    Args:
      adapters: what `s4d.load(..., lora=)` takes.
      scenes: how many, of the validation split.
      model: whose adapters they are.
    """
    table = Table("", *(f"{reading}, mIoU %" for reading in READINGS))
    for lora in (None, *adapters):
        pipe = s4d.load(model, dtype="float32", lora=lora)
        table.add_row(lora or "without adapters", *(f"{value:.1f}" for value in readings(pipe, scenes)))
    Console().print(table)


def readings(pipe: Pipeline, scenes: int) -> list[float]:
    """mIoU in percent of each reading."""
    confusions = np.zeros((2, len(CLASSES), len(CLASSES)), np.int64)
    overlaps = np.zeros((2, len(CLASSES)), np.int64)  # of every class: intersections, unions
    block = pipe.expert_block
    assert block is not None, "the model does not say which block segments best"
    request = AttentionRequest(mean_heads=True)
    for index in track(range(scenes), "reading", console=Console(stderr=True)):
        shown = scene("validation", index, pipe.trained_size)
        prompts = class_prompts(pipe.tokenizers, [CLASSES[each] for each in shown.classes])
        record = pipe.attention(shown.image, prompts.prompts[0], blocks=block, seed=index, request=request)[block]
        averaging = prompts.averaging(len(shown.classes))[0]
        by_probs, by_scores = (
            upsampled(averaging @ np.asarray(maps)[0].T, shown.labels.shape) for maps in (record.probs, record.scores)
        )
        classes = np.array(shown.classes)
        for confusion, maps in zip(confusions, (by_probs, by_scores), strict=True):
            np.add.at(confusion, (shown.labels, classes[maps.argmax(axis=0)]), 1)
        inside, truth = by_scores > 0, shown.labels == classes[:, None, None]
        overlaps[0, classes] += (inside & truth).sum(axis=(1, 2))
        overlaps[1, classes] += (inside | truth).sum(axis=(1, 2))
    intersections, unions = overlaps[:, overlaps[1] > 0]
    return [*(100 * mean_iou(confusion) for confusion in confusions), float(100 * np.mean(intersections / unions))]


def upsampled(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[classes, tokens] of a square grid to [classes, height, width]."""
    side = round(maps.shape[1] ** 0.5)
    down, across = (np.asarray(bilinear_matrix(side, to, rows=to)) for to in size)
    return np.einsum("hr,krc,wc->khw", down, maps.reshape(-1, side, side), across)


if __name__ == "__main__":
    auto_cli(main)
