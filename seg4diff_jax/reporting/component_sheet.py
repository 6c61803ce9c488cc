"""Draws principal components of image tokens as colours, for every block's queries, keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from seg4diff_jax.reporting.overlays import CELL_LONGEST, SHEET_LONGEST, contact_sheet

PROJECTIONS = ("query", "key", "value")
SHOWN_PERCENTILES = 1, 99
"""Scores below the first are 0 in their channel, above the last 255: so outlying tokens leave the range to others."""


def component_colors(scores: Float[np.ndarray, "*lead tokens 3"]) -> UInt8[np.ndarray, "*lead tokens 3"]:
    """Returns tokens' scores on three components as red, green and blue, each over its own range of scores.

    The range is from the 1st to the 99th percentile over tokens. A component that is the same everywhere is black.
    """
    scores = np.asarray(scores, np.float64)
    least, greatest = np.percentile(scores, SHOWN_PERCENTILES, axis=-2, keepdims=True)
    unit = (scores - least) / np.maximum(greatest - least, np.finfo(np.float32).tiny)
    return np.round(255 * unit.clip(0, 1)).astype(np.uint8)


def component_sheet(
    scores: Float[np.ndarray, "blocks 3 tokens 3"], grid: tuple[int, int], blocks: Sequence[int] | None = None
) -> Image.Image:
    """Draws one image's components: a row each for queries, keys and values, a column for each block.

    A token is a square of one colour (`component_colors`). Colours of different cells do not compare.

    Args:
      scores: one image's of `analysis.principal_components.block_components`.
      grid: rows and columns of the image's tokens.
      blocks: their numbers, which titles name. Default: from 0.

    Raises:
      ValueError: the tokens are not those of the grid, or there is not one number for each block.
      FloatingPointError: scores are not finite.
    """
    rows, columns = grid
    blocks = range(len(scores)) if blocks is None else blocks
    if scores.shape[2] != rows * columns:
        raise ValueError(f"scores of {scores.shape[2]} tokens; expected {rows * columns}, of a grid {rows} x {columns}")
    if len(blocks) != len(scores):
        raise ValueError(f"scores of {len(scores)} blocks and {len(blocks)} block numbers; expected one for each")
    if not np.isfinite(scores).all():
        raise FloatingPointError("principal components are not finite: damaged weights or inputs")
    # The more blocks, the smaller their cells. Squares are of whole pixels, and the sheet is not shrunk, which blurs.
    side = min(CELL_LONGEST, round(0.9 * SHEET_LONGEST / len(blocks)))
    enlarged = math.ceil(side / max(rows, columns))
    colors = component_colors(scores).reshape(len(blocks), 3, rows, columns, 3)
    colors = colors.repeat(enlarged, axis=2).repeat(enlarged, axis=3)
    cells = [
        (name, f"block {block}", Image.fromarray(colors[column, row]))
        for row, name in enumerate(PROJECTIONS)
        for column, block in enumerate(blocks)
    ]
    return contact_sheet(cells, longest=4 * SHEET_LONGEST, columns=len(blocks))
