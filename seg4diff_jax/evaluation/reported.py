"""Mean IoU that the paper reports (Seg4Diff, arXiv 2509.18096), for rows that were measured in its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seg4diff_jax.evaluation.options import UNSUPERVISED
from seg4diff_jax.models.mmdit_config import MMDiTConfig

BY_NAMES = {
    "voc20": (89.2, 89.8),
    "coco-object": (62.0, 62.9),
    "context59": (49.0, 51.2),
    "ade20k150": (34.2, 35.2),
}
"""Percent: SD3-medium as it is, and with the adapters that MAGNET trained on COCO."""
WITHOUT_NAMES = {
    "voc21": (54.9, 56.1),
    "context60": (52.6, 53.5),
    "coco-object": (38.5, 38.8),
    "coco-stuff27": (49.7, 53.5),
    "ade20k150": (44.9, 45.4),
}
"""The same of segments without names. The paper calls `context60` Context59; background is a class of it."""
THRESHOLDS = (0.1, 0.035)
"""The release's: which of them made the table is not known."""
BLOCK, STEP = 9, 8
SPLITS = ("val", "validation")
SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": False}
TRAINED_SIZE = 1024


def reported_miou(row: Mapping[str, Any], config: MMDiTConfig, trained_size: int) -> float | None:
    """The paper's figure for a row of scores; None where it has none for this model, set and way of measuring.

    A row of a model with adapters has MAGNET's, whatever they are.

    Args:
      config, trained_size: of the model, which is told by them: what has been trained into weights since is not seen.
    """
    sizes_alike = all(getattr(config, name) == value for name, value in SD3_MEDIUM.items())
    sd3_medium = sizes_alike and not config.dual_attention_layers and trained_size == TRAINED_SIZE
    expert = (row["block"], row["head"], row["step"]) == (BLOCK, None, STEP) and row["split"] in SPLITS
    if row["protocol"] == UNSUPERVISED:
        found, alike = WITHOUT_NAMES, _released_match(row)
    else:
        found, alike = BY_NAMES, _asked_alike(row)
    if not (sd3_medium and expert and alike) or row["dataset"] not in found:
        return None
    plain, magnet = found[row["dataset"]]
    return plain if row["lora"] is None else magnet


def _asked_alike(row: Mapping[str, Any]) -> bool:
    # The release asks for the background and does not score it.
    asked = row["prompts"] == "present" and row["names"] != "readable" and row["background"] in (None, "asked")
    return asked and row["resize"] != "aspect"


def _released_match(row: Mapping[str, Any]) -> bool:
    made = row["resize"] == "release" and row["minmax"] == "token" and row["threshold"] in THRESHOLDS
    return made and row["match"] == "row" and row["absent_classes"] and row["background"] in (None, "scored")
