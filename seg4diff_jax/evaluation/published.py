"""Which of the paper's figures stand beside a row of scores: those of the same model, measured in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seg4diff_jax.evaluation.options import UNSUPERVISED
from seg4diff_jax.evaluation.paper import FIGURES, Figure
from seg4diff_jax.models.lora import IMAGE_ATTENTION, LoRAConfig
from seg4diff_jax.models.sd3.config import MMDiTConfig

METHOD = "Seg4Diff"
MODELS: dict[str, dict[str, Any]] = {
    "SD3": {"qk_norm": False, "dual_attention_layers": ()},
    "SD3.5": {"qk_norm": True, "dual_attention_layers": tuple(range(13))},
}
"""What tells the two medium models of the paper apart. FLUX.1-dev is not implemented."""
SIZES = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
TRAINED_SIZE = 1024
MAGNET = LoRAConfig(rank=16, alpha=16.0, targets=tuple(sorted(IMAGE_ATTENTION)), blocks=None)
"""The published adapters, as `models.lora.attached` describes them."""
IMAGES = {
    "voc20": 1449,
    "voc21": 1449,
    "context59": 5104,
    "context60": 5104,
    "coco-object": 5000,
    "coco-stuff27": 5000,
    "ade20k150": 2000,
    "cityscapes19": 500,
}
"""Of the whole validation split. Of Stuff27 others score a curated 2175, and the paper does not say which it did."""
BLOCK, STEP = 9, 8
"""Of both models; the noise level is counted from the clean end of 28."""
SPLITS = ("val", "validation")
RESIZES = ("release", "paper")
"""The released code's way, and the one that the paper describes: which of them made the tables is not known."""
THRESHOLDS = (0.1, 0.035)
"""The release's: which of them made Table 2 is not known."""


def reported(
    row: Mapping[str, Any], config: MMDiTConfig, trained_size: int, adapters: LoRAConfig | None = None
) -> tuple[Figure, ...]:
    """The paper's figures for a row of scores; none where it has none for this model, set and way of measuring.

    Of a model with adapters like MAGNET's there are two, one for each set of images that the paper trained them on: a
    file of adapters does not say which.

    Args:
      config, trained_size: of the model, which is told by them: what has been trained into weights since is not seen.
      adapters: rank, alpha, layers and blocks of the model's adapters, see `models.lora.attached`.
    """
    model = _model(config, trained_size)
    if model is None or not _measured_alike(row) or adapters not in (None, MAGNET):
        return ()
    return tuple(
        figure
        for figure in FIGURES
        if (figure.method, figure.model) == (METHOD, model)
        and (figure.dataset, figure.protocol) == (row["dataset"], row["protocol"])
        and (figure.magnet is None) == (adapters is None)
    )


def _model(config: MMDiTConfig, trained_size: int) -> str | None:
    if trained_size != TRAINED_SIZE:
        return None
    alike = lambda marks: all(getattr(config, name) == value for name, value in (SIZES | marks).items())
    return next((name for name, marks in MODELS.items() if alike(marks)), None)


def _measured_alike(row: Mapping[str, Any]) -> bool:
    whole = not row["skipped"] and row["list"] is None
    whole = whole and row["images"] + row["unlabelled_images"] == IMAGES.get(row["dataset"])
    expert = (row["block"], row["head"], row["step"]) == (BLOCK, None, STEP)
    alike = _released_match(row) if row["protocol"] == UNSUPERVISED else _asked_alike(row)
    labelled = row["split"] in SPLITS and row["unlabelled"] in (None, "background")
    return whole and expert and alike and labelled and row["resize"] in RESIZES


def _asked_alike(row: Mapping[str, Any]) -> bool:
    # The release asks for the background and does not score it.
    return row["prompts"] == "present" and row["names"] != "readable" and row["background"] in (None, "asked")


def _released_match(row: Mapping[str, Any]) -> bool:
    made = row["minmax"] == "token" and row["threshold"] in THRESHOLDS
    return made and row["match"] == "row" and row["absent_classes"] and row["background"] in (None, "scored")
