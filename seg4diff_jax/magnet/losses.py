"""Focal and dice losses between predicted and given masks.

Each image has a fixed number of rows of masks; only those marked as real count. Predictions are on the grid of image
tokens and are upsampled to the masks' own size. This happens for one row of masks at a time, and again in the backward
pass, so memory does not grow with the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seg4diff_jax.bilinear import upsampler

FocalWeight = Literal["sigmoid", "release"]
"""What the focal loss weighs pixels by: the error of the score's sigmoid, or, in the release, the raw score instead."""
ALPHA, GAMMA = 0.25, 2.0


class MaskLosses(NamedTuple):
    """Focal and dice loss as means over a batch, before any weight."""

    focal: Float[Array, ""]
    dice: Float[Array, ""]


def focal_loss(
    logits: Float[Array, "*masks height width"],
    masks: Bool[Array, "*masks height width"],
    *,
    alpha: float = ALPHA,
    gamma: float = GAMMA,
    focal: FocalWeight = "sigmoid",
) -> Float[Array, "*masks"]:
    """Mean over pixels of each mask's binary focal loss (Lin et al. 2017), fp32.

        pixels in the mask    -alpha (1 - p)^gamma log p,              p = sigmoid(logit)
        all others            -(1 - alpha) p^gamma log(1 - p)

    Gradients are finite for any finite logit. With `release`, the p that is raised to gamma is the logit itself, so the
    loss grows with the third power of the logit.
    """
    return focal_terms(logits, masks, alpha=alpha, gamma=gamma, focal=focal).mean(axis=(-2, -1))


def focal_terms(
    logits: Float[Array, "*shape"],
    inside: Bool[Array, "*#shape"] | bool,
    *,
    alpha: float = ALPHA,
    gamma: float = GAMMA,
    focal: FocalWeight = "sigmoid",
) -> Float[Array, "*shape"]:
    """Returns each pixel's focal loss, fp32. `inside`: whether pixels are in the mask, for each pixel or for all."""
    logits = logits.astype(jnp.float32)
    towards = jnp.where(inside, logits, -logits)
    if focal == "release":
        weight = jnp.square(jnp.where(inside, 1 - logits, logits))
    else:
        # sigmoid(-towards)^gamma, in a form whose derivative does not divide by the sigmoid.
        weight = jnp.exp(-gamma * jax.nn.softplus(towards))
    return jnp.where(inside, alpha, 1 - alpha) * weight * jax.nn.softplus(-towards)


def dice_loss(
    probs: Float[Array, "*masks height width"], masks: Bool[Array, "*masks height width"]
) -> Float[Array, "*masks"]:
    """Returns 1 - (2 sum p m + 1) / (sum p + sum m + 1) of each mask, fp32; p in 0..1."""
    probs, pixels = probs.astype(jnp.float32), (-2, -1)
    overlap = jnp.where(masks, probs, 0).sum(pixels)
    return 1 - (2 * overlap + 1) / (probs.sum(pixels) + masks.sum(pixels) + 1)


def mask_losses(
    logits: Float[Array, "batch masks rows columns"],
    masks: Bool[Array, "batch masks height width"],
    real: Bool[Array, "batch masks"],
    *,
    alpha: float = ALPHA,
    gamma: float = GAMMA,
    focal: FocalWeight = "sigmoid",
) -> MaskLosses:
    """Returns the mean of both losses over all real masks of a batch; 0 if there are none.

    The prediction is sigmoid(logit).

    Args:
      logits: logits of each mask, on the grid of image tokens.
      real: rows that hold a mask; the other rows are ignored.
    """
    upsample = upsampler(logits.shape[2:], masks.shape[2:])

    def of_row(logits: Array, masks: Array) -> tuple[Array, Array]:
        logits = upsample(logits)
        return (
            focal_loss(logits, masks, alpha=alpha, gamma=gamma, focal=focal),
            dice_loss(jax.nn.sigmoid(logits), masks),
        )

    focals, dices = _by_row(of_row, logits.astype(jnp.float32), masks)
    return MaskLosses(_mean(focals, real), _mean(dices, real))


def class_losses(
    probs: Float[Array, "batch classes rows columns"],
    masks: Bool[Array, "batch classes height width"],
    real: Bool[Array, "batch classes"],
    *,
    gamma: float = GAMMA,
) -> MaskLosses:
    """Returns focal and dice loss of zero-shot segmentation's class scores, normalised to a distribution q.

        log q = log-softmax over the real classes of log(upsampled score) = log(score) - log(sum of scores)

    Evaluation gives each pixel the class of the largest q, so this loss trains what is measured. The classes of a
    prompt exclude each other. A pixel's focal loss is that of its own class, -(1 - q)^gamma log q (gamma 0:
    cross-entropy); the mean is over an image's labelled pixels, then over images. The other classes have no term of
    their own, because the q of all classes sum to 1; so there is no alpha. The binary form would need log(1 - q), which
    is infinite in a prompt of one class. Pixels of no class are left out of both losses, since q cannot express "none".

    Args:
      probs: class scores on the grid of image tokens, see `segmentation.open_vocabulary.class_scores`.
      real: rows that hold a class of the image's prompt.
    """
    upsample = upsampler(probs.shape[2:], masks.shape[2:])
    masks = masks & real[:, :, None, None]
    labelled = masks.any(axis=1)
    pixels = labelled.sum(axis=(-2, -1))
    probs = jnp.where(real[:, :, None, None], probs.astype(jnp.float32), 0)
    log_total = _log(upsample(probs.sum(axis=1)))

    def of_row(probs: Array, masks: Array) -> tuple[Array, Array]:
        log_q = jnp.minimum(_log(upsample(probs)) - log_total, 0)
        focus = (-jnp.expm1(log_q)) ** gamma if gamma else 1.0  # the derivative of 0^0 would be NaN
        terms = -focus * log_q
        focal = jnp.where(masks, terms, 0).sum(axis=(-2, -1)) / jnp.maximum(pixels, 1)
        return focal, dice_loss(jnp.where(labelled, jnp.exp(log_q), 0), masks)

    focals, dices = _by_row(of_row, probs, masks)
    return MaskLosses(_mean(focals.sum(axis=1), pixels > 0), _mean(dices, real))


def _by_row(losses: Callable[[Array, Array], tuple[Array, Array]], *arrays: Any) -> tuple[Array, Array]:
    """Computes the losses [batch] of one row of masks at a time. Returns both losses, each [batch, rows]."""
    rows = tuple(jnp.swapaxes(array, 0, 1) for array in arrays)
    found = jax.lax.map(jax.checkpoint(lambda row: losses(*row)), rows)
    return found[0].T, found[1].T


def _mean(losses: Float[Array, "*rows"], counted: Bool[Array, "*rows"]) -> Float[Array, ""]:
    return jnp.where(counted, losses, 0).sum() / jnp.maximum(counted.sum(), 1)


def _log(probs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the log, clamped at the smallest normal fp32 number. Below it gradients are zero."""
    return jnp.log(jnp.maximum(probs, jnp.finfo(jnp.float32).tiny))
