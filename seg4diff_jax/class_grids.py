"""Class scores of images that are each asked for a list of classes, of any length: one jitted call for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from seg4diff_jax.class_maps import read_class_scores
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.passes import Views
from seg4diff_jax.segmentation.class_prior import ClassPrior, divided_by_prior
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions
from seg4diff_jax.segmentation.open_vocabulary import padded_rows
from seg4diff_jax.text import ClassPrompts

NO_TEXT = ""
"""What images read where class words are concepts."""


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


def as_many_for_each(
    image_of_row: Int[np.ndarray, " rows"], images: int
) -> tuple[Int[np.ndarray, " more_rows"], Bool[np.ndarray, " more_rows"]]:
    """Returns rows so that all images have as many, in order of images, and which of them are not there to fill up.

    Args:
      image_of_row: the image of each row, ascending. An image may have none.
    """
    counts = np.bincount(image_of_row, minlength=images)
    first, each = np.cumsum(counts) - counts, np.arange(counts.max())
    return np.minimum(first[:, None] + each, len(image_of_row) - 1).reshape(-1), (each < counts[:, None]).reshape(-1)


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
      how: further options of `class_maps.read_class_scores`.
    """
    rows = padded_rows(max(len(item.classes) for item in prompts))
    said, image_of_prompt, averaging = prompt_rows(prompts, rows)
    averaging = divided_by_prior(averaging, prior_rows(prompts, rows, prior), masks.prior)
    beside = None
    if masks.reading == "prompt":
        texts, image_of_prompt, averaging = spread((encode(said), image_of_prompt, averaging))
        views = replace(views, each=tuple(replace(one, image_of_prompt=image_of_prompt) for one in views.each))
    else:
        places, is_own = as_many_for_each(image_of_prompt, len(prompts))
        averaging = np.where(is_own[:, None, None], averaging[places], np.float32(0))
        texts, averaging = spread((encode([said[place] for place in places]), averaging))
        beside = spread(encode([NO_TEXT] * len(prompts)))
    scores = read_class_scores(transformer, views, texts, averaging, beside, masks=masks, **how)
    return [grid[: len(item.classes)] for grid, item in zip(np.asarray(scores), prompts, strict=True)]
