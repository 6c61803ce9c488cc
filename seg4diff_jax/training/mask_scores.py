"""Scores segmentation by the attention of several blocks, in the same pass that predicts the velocity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seg4diff_jax.data.loader import Batch
from seg4diff_jax.flow import velocity_loss, velocity_target
from seg4diff_jax.models.attention import ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.passes import MEAN_PROBS, NoisedImages, velocity
from seg4diff_jax.segmentation.metrics import IGNORED, confusion_matrix
from seg4diff_jax.segmentation.open_vocabulary import class_scores, label_map


def confusions(
    transformer: MMDiT,
    images: NoisedImages,
    texts: TextConditioning,
    batch: Batch,
    *,
    classes: int,
    blocks: tuple[int, ...],
) -> tuple[Int[Array, "blocks classes classes"], Float[Array, " batch"]]:
    """Returns a confusion matrix of the label maps of each block in `blocks`, and each image's velocity loss.

    Args:
      batch: `labels` at the size at which they are scored, and `averaging` and `class_of_row` of each image's prompt.
    """
    averaging, rows = batch["averaging"], batch["class_of_row"].astype(jnp.int32)
    predicted_velocity, records = velocity(
        transformer, images, texts, capture=blocks, options=ForwardOptions(MEAN_PROBS)
    )
    grid, size = images.grid(transformer.config.patch_size), batch["labels"].shape[1:3]

    def predicted(scores: Array, row_classes: Array) -> Array:
        best = label_map(scores.reshape(-1, *grid), size, present=row_classes != IGNORED)
        return row_classes[best]

    def confusion(probs: Array) -> Array:
        labels = jax.vmap(predicted)(class_scores(probs, averaging), rows)
        return confusion_matrix(batch["labels"], labels, classes)

    probs = jnp.stack([records[block].probs for block in blocks])  # pyright: ignore
    loss = velocity_loss(predicted_velocity, velocity_target(images.latents, images.noise))
    return jax.lax.map(confusion, probs), loss
