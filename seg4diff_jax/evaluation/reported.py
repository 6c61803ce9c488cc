"""Mean IoU that the paper reports (Seg4Diff, arXiv 2509.18096), for rows that were measured in its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seg4diff_jax.models.mmdit_config import MMDiTConfig

OPEN_VOCABULARY = {"voc20": 89.2, "coco-object": 62.0, "context59": 49.0, "ade20k150": 34.2}
"""Percent, SD3-medium without training."""
BLOCK, STEP = 9, 8
SPLITS = ("val", "validation")
SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": False}
TRAINED_SIZE = 1024


def reported_miou(row: Mapping[str, Any], config: MMDiTConfig, trained_size: int) -> float | None:
    """The paper's figure for a row of scores; None where it has none for this model, set and way of measuring.

    Args:
      config, trained_size: of the model, which is told by them: what has been trained into weights since is not seen.
    """
    asked_alike = row["prompts"] == "present" and row["names"] != "readable" and row["split"] in SPLITS
    background_alike = row["background"] in (None, "asked")  # the release asks for it and does not score it
    expert = (row["block"], row["step"]) == (BLOCK, STEP)
    sizes_alike = all(getattr(config, name) == value for name, value in SD3_MEDIUM.items())
    sd3_medium = sizes_alike and not config.dual_attention_layers and trained_size == TRAINED_SIZE
    if not (asked_alike and background_alike and expert and sd3_medium):
        return None
    return OPEN_VOCABULARY.get(row["dataset"])
