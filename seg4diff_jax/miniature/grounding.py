"""Scores zero-shot segmentation by each block's attention, on validation scenes. No masks are trained on.

Each scene's prompt is the names of its own classes, as in zero-shot segmentation (Seg4Diff, section 3). One forward
pass records all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from seg4diff_jax.data.loader import Batch, DataSource, Item, evaluation_batches
from seg4diff_jax.flow import image_noise
from seg4diff_jax.miniature.scenes import caption_ids
from seg4diff_jax.miniature.world.shapes import CLASSES, THINGS, Scene
from seg4diff_jax.models.encoders import TokenIds
from seg4diff_jax.parallel import on_host
from seg4diff_jax.passes import NoisedImages, encode_prompts
from seg4diff_jax.segmentation.metrics import IGNORED, mean_iou
from seg4diff_jax.text import Tokenizers, class_prompts
from seg4diff_jax.training.mask_scores import confusions

MOST_CLASSES = 8
"""Number of rows for the classes of one scene."""


def grounding_item(scene: Scene, tokenizers: Tokenizers) -> Item:
    """Returns a scene's labels and class prompt: token ids, averaging weights, and the class of each row."""
    prompts = class_prompts(tokenizers, [CLASSES[index] for index in scene.classes])
    (prompt,) = prompts.prompts
    rows = np.full(MOST_CLASSES, IGNORED, np.uint8)
    rows[: len(scene.classes)] = scene.classes
    averaging = prompts.averaging(MOST_CLASSES)[0]
    return {"labels": scene.labels, "averaging": averaging, "class_of_row": rows, **caption_ids(tokenizers, prompt)}


@partial(jax.jit, static_argnames=("classes",))
def block_confusions(
    denoiser: Any, batch: Batch, noise: Float[Array, "batch rows columns channels"], sigma: Array, classes: int
) -> tuple[Int[Array, "blocks classes classes"], Float[Array, " batch"]]:
    """Returns a confusion matrix of every block's label maps at one noise level, and each scene's velocity loss."""
    transformer = denoiser.transformer
    ids = TokenIds(*(batch[name].astype(jnp.int32) for name in ("clip_l", "clip_g")))
    texts = encode_prompts(denoiser.encoders, ids, joint_dim=transformer.config.joint_attention_dim)
    images = NoisedImages(batch["latents"].astype(jnp.float32), noise, sigma)
    return confusions(transformer, images, texts, batch, classes=classes, blocks=tuple(range(transformer.depth)))


def grounding(
    denoiser: nnx.Module, source: DataSource, *, sigmas: Sequence[float], batch_size: int, seed: int = 0
) -> dict[str, float]:
    """Returns the zero-shot mIoU, in percent, of every block at every noise level.

    Args:
      denoiser: a model with `transformer` and `encoders`.
      source: items with `latents` and the fields of `grounding_item`.

    Returns:
      `block` and `sigma`: the best block and its best noise level; `miou`, `things` and `stuffs` there, the latter two
      being the mean IoU of things and of stuffs; `velocity_loss`, the mean over scenes and noise levels with class
      prompts; and `miou/block@sigma` and `things/block@sigma` for every block and level. All mIoU are NaN where the
      loss is not finite: with scores of NaN, every pixel would get the first class.
    """
    classes, things = len(CLASSES), range(len(THINGS))
    confusions: dict[float, Any] = dict.fromkeys(sigmas, 0)
    losses: list[np.ndarray] = []
    for batch, count in evaluation_batches(source, batch_size):
        noise = image_noise(seed, batch["index"], batch["latents"].shape[1:])
        labels = np.where((np.arange(batch_size) < count)[:, None, None], batch["labels"], IGNORED)
        for sigma in sigmas:
            matrices, loss = block_confusions(denoiser, {**batch, "labels": labels}, noise, jnp.float32(sigma), classes)
            confusions[sigma] = confusions[sigma] + on_host(matrices).astype(np.int64)
            losses.append(on_host(loss)[:count])
    loss = float(np.concatenate(losses).mean())
    percent = 100.0 if np.isfinite(loss) else float("nan")
    table = {
        (block, sigma): {
            "miou": percent * mean_iou(matrix),
            "things": percent * mean_iou(matrix, things),
            "stuffs": percent * mean_iou(matrix, range(len(THINGS), classes)),
        }
        for sigma, matrices in confusions.items()
        for block, matrix in enumerate(matrices)
    }
    block, sigma = max(table, key=lambda place: np.nan_to_num(table[place]["miou"], nan=-1.0))
    every = {
        f"{name}/{b}@{s:g}": scores[name] for name in ("miou", "things") for (b, s), scores in sorted(table.items())
    }
    best = {"block": float(block), "sigma": sigma, "velocity_loss": loss}
    return table[block, sigma] | best | every
