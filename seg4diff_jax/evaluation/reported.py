"""Mean IoU that the paper reports (Seg4Diff, arXiv 2509.18096), for rows that were measured in its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seg4diff_jax.models.mmdit_config import MMDiTConfig
from seg4diff_jax.pipeline import Pipeline

OPEN_VOCABULARY = {"voc20": 89.2, "coco-object": 62.0, "context59": 49.0, "ade20k150": 34.2}
"""Percent, SD3-medium without training."""
BLOCK, STEP = 9, 8
SPLITS = ("val", "validation")
SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": False}


def reported_miou(row: Mapping[str, Any], pipe: Pipeline) -> float | None:
    """The paper's figure for a row of scores; None where it has none for this model, set and way of measuring."""
    asked_alike = row["prompts"] == "present" and row["names"] != "readable" and row["split"] in SPLITS
    if not asked_alike or (row["block"], row["step"]) != (BLOCK, STEP) or not is_sd3_medium(pipe):
        return None
    if row["background"] not in (None, "asked"):  # the release asks for it and does not score it
        return None
    return OPEN_VOCABULARY.get(row["dataset"])


def is_sd3_medium(pipe: Pipeline) -> bool:
    """By its sizes: whatever has been trained into the weights since is not seen."""
    config: MMDiTConfig = pipe.transformer.config
    alike = all(getattr(config, name) == value for name, value in SD3_MEDIUM.items())
    return alike and not config.dual_attention_layers and pipe.trained_size == 1024
