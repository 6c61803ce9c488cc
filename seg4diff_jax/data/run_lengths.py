"""Decodes COCO's run lengths: numbers of pixels that are, in turn, outside and inside a mask, down the columns.

As text, each number from the third on is the difference to the length two before. Numbers are written in groups of five
bits, lowest first, each as a character from '0' on. The bit 32 means that another group follows. The bit 16 in the last
group means a negative number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from seg4diff_jax.data.errors import FolderError

LONGEST = 6
"""Most groups of one number: 30 bits, more than an image has pixels."""


def decoded(mask: Any, size: tuple[int, int], place: str) -> Bool[np.ndarray, "height width"]:
    """Decodes COCO's run lengths, a list or text, to a mask.

    Args:
      size: height and width of the image.
      place: place of the run lengths, for messages.

    Raises FolderError if they are polygons, are damaged, have another size, or do not add up to the image's pixels.
    """
    from pycocotools import mask as run_lengths

    if isinstance(mask, list):
        raise FolderError(f"{place}: a mask is of polygons; expected run lengths: {{'size': .., 'counts': ..}}")
    try:
        found = tuple(mask["size"])
        if len(found) != 2 or not all(type(side) is int for side in found):
            raise ValueError(f"its size is {str(found)[:40]}")
        if found != size:
            raise FolderError(f"{place}: a mask is of size {found}; expected the image's, {size} (height, width)")
        counts = lengths_of(mask["counts"])
        if (counts < 0).any() or int(counts.sum()) != size[0] * size[1]:
            raise ValueError(f"counts make {int(counts.sum())} pixels, and the image has {size[0] * size[1]}")
        encoded = run_lengths.frPyObjects(mask, *size) if isinstance(mask["counts"], list) else mask
        return run_lengths.decode(encoded).view(bool)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        if isinstance(error, FolderError):
            raise
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise FolderError(f"{place}: a mask is damaged: {what}") from None


def lengths_of(counts: Any) -> Int[np.ndarray, " runs"]:
    """Returns the run lengths in a list or text, int64. Raises ValueError, TypeError or OverflowError for others."""
    if isinstance(counts, list):
        if not all(type(count) is int for count in counts):
            raise ValueError("its counts are not whole numbers")
        return np.array(counts, np.int64)
    codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any():
        raise ValueError("its counts are no text of run lengths")
    if not len(codes):
        return np.zeros(0, np.int64)
    last = codes < 32
    if not last[-1]:
        raise ValueError("its counts are cut off")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (groups := ends - starts + 1).max() > LONGEST:
        raise ValueError("its counts are more than an image has pixels")
    place = np.arange(len(codes)) - np.repeat(starts, groups)
    numbers = np.add.reduceat((codes & 31) << 5 * place, starts)
    numbers -= np.where(codes[ends] & 16, np.int64(1) << 5 * groups, 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers
