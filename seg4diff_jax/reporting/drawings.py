"""Results over the image that they are of, as a picture: masks, and attention to the words of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from seg4diff_jax.images import ImageInput, read_image
from seg4diff_jax.prompt_attention import PromptAttention
from seg4diff_jax.reporting.overlays import (
    CELL_LONGEST,
    contact_sheet,
    heat_picture,
    heat_sheet,
    masked_picture,
    overlay,
    percent,
)
from seg4diff_jax.segmentation.open_vocabulary import Segmentation
from seg4diff_jax.segmentation.unsupervised import UnsupervisedSegmentation

STAGE_LONGEST = 700
"""Most pixels of the longer side of one stage's picture."""


def draw_masks(image: ImageInput, masks: Segmentation | UnsupervisedSegmentation) -> Image.Image:
    """Draws translucent, outlined masks over the image, with their names on them and a legend with their areas.

    A small image is shown larger, a very large one smaller. Segments without names are called `segment 1` and so on.

    Args:
      image: that the masks are of: what `Pipeline.segment` took.

    Raises:
      ImageError: the image cannot be read.
      ValueError: the masks are of an image of another size.
    """
    pixels = read_image(image)
    if masks.labels.shape != pixels.shape[:2]:
        found, expected = (" x ".join(map(str, each.shape[:2])) for each in (masks.labels, pixels))
        raise ValueError(f"masks of {found} pixels on an image of {expected}: draw them on the image that they are of")
    named = masks.named() if isinstance(masks, UnsupervisedSegmentation) else masks
    return overlay(pixels, named.labels, named.classes)


def draw_stages(image: ImageInput, stages: Sequence[tuple[str, Segmentation]]) -> Image.Image:
    """Draws one image's masks as they are made, side by side: each under its name, and how many pixels it changes.

    Args:
      image: that the masks are of, at its size.
      stages: name and masks, in order; all of the same classes.

    Raises ImageError when the image cannot be read.
    """
    pixels, cells, before = read_image(image), [], None
    for name, each in stages:
        changed = "" if before is None else f"changes {percent(float((each.labels != before).mean()))}"
        picture = masked_picture(pixels, each.labels, each.classes)
        picture.thumbnail((STAGE_LONGEST, STAGE_LONGEST), Image.Resampling.LANCZOS)
        cells.append((name, changed, picture))
        before = each.labels
    return contact_sheet(cells)


def draw_words(image: ImageInput, attention: PromptAttention, words: str | Sequence[str] | None = None) -> Image.Image:
    """Draws the image, and beside it the map of each word (`PromptAttention.of`) over the image in grey.

    Each map is drawn from its least to its greatest value, which its title names in percent.

    Args:
      image: that the attention is of, at any size: what `Pipeline.attention` takes.
      words: one or several, each a word of the prompt or several that follow one another. Default: all its words.

    Raises:
      ImageError: the image cannot be read.
      ValueError: as `PromptAttention.of`; or there is no word.
      FloatingPointError: a map has numbers that are not finite.
    """
    wanted = attention.text.spoken if words is None else [words] if isinstance(words, str) else list(words)
    if not wanted:
        raise ValueError(f"no word to draw of the prompt {attention.prompt!r}")
    maps = {word: np.asarray(attention.of(word)) for word in wanted}
    for word, each in maps.items():
        if not np.isfinite(each).all():
            raise FloatingPointError(f"attention to {word!r} is not finite: damaged weights or inputs")
    return draw_maps(image, list(maps.items()))


def draw_maps(
    image: ImageInput, maps: Sequence[tuple[str, Float[np.ndarray, "rows columns"]]], columns: int | None = None
) -> Image.Image:
    """Draws the image, and beside it maps of its image tokens over the image in grey, each under its title.

    Each map is drawn from its least to its greatest value, which are beside the title in percent.

    Args:
      image: that the maps are of, at any size.
      columns: maps in a row, under the image. Default: as many as give the sheet about the shape of a screen.

    Raises ImageError when the image cannot be read.
    """
    pixels = read_image(image)
    cells = [(title, each, heat_picture(pixels, each, CELL_LONGEST)) for title, each in maps]
    return heat_sheet(pixels, cells, columns)
