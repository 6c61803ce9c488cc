"""Class scores of images that are each asked for a list of classes, of any length: one jitted call for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.passes import Views, read_class_scores
from seg4diff_jax.segmentation.class_prior import ClassPrior, divided_by_prior
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions
from seg4diff_jax.segmentation.open_vocabulary import padded_rows
from seg4diff_jax.text import ClassPrompts


def prompt_rows(
    each: Sequence[ClassPrompts], classes: int
) -> tuple[list[str], Int[np.ndarray, " rows"], Float[np.ndarray, "rows classes tokens"]]:
    """Returns the prompts of several images as rows of a batch: their texts, each one's image, and its averaging.

    Args:
      each: of each image, its prompts.
      classes: rows of each averaging, at least as many as an image has classes.
    """
    texts = [text for item in each for text in item.prompts]
    image_of_row = np.repeat(np.arange(len(each), dtype=np.int32), [len(item.prompts) for item in each])
    return texts, image_of_row, np.concatenate([item.averaging(classes) for item in each])


def prior_rows(
    each: Sequence[ClassPrompts], classes: int, prior: ClassPrior | None
) -> Float[np.ndarray, "rows classes"]:
    """Returns the prior of each class in the rows of `prompt_rows`: 1 past an image's classes, and without a prior.

    Raises ValueError for a class that was not measured.
    """
    found = np.ones((len(each), classes), np.float32)
    for place, item in enumerate(each):
        if prior is not None:
            found[place, : len(item.classes)] = prior.of(item.classes)
    return np.repeat(found, [len(item.prompts) for item in each], axis=0)


def class_grids(
    transformer: MMDiT,
    views: Views,
    prompts: Sequence[ClassPrompts],
    *,
    encode: Callable[[list[str]], TextConditioning],
    spread: Callable[[Any], Any],
    masks: MaskOptions = PAPERS_MASKS,
    prior: ClassPrior | None = None,
    **how: Any,
) -> list[Float[np.ndarray, "_ grid_rows grid_columns"]]:
    """Returns the scores of each image's own classes, one row of the batch for each prompt of each image.

    Args:
      views: the images, of one size.
      prompts: of each image.
      encode: makes the conditioning of texts.
      spread: puts arrays on the devices.
      masks: how maps are fused and refined.
      prior: what maps are divided by a power of, which `masks` says.
      how: further options of `passes.read_class_scores`.
    """
    rows = padded_rows(max(len(item.classes) for item in prompts))
    said, image_of_prompt, averaging = prompt_rows(prompts, rows)
    averaging = divided_by_prior(averaging, prior_rows(prompts, rows, prior), masks.prior)
    texts, image_of_prompt, averaging = spread((encode(said), image_of_prompt, averaging))
    each = tuple(replace(images, image_of_prompt=image_of_prompt) for images in views.each)
    scores = read_class_scores(transformer, replace(views, each=each), texts, averaging, masks=masks, **how)
    return [grid[: len(item.classes)] for grid, item in zip(np.asarray(scores), prompts, strict=True)]
