"""`seg4diff segment-unsupervised IMAGE --model MODEL`: segments an image without class names."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from jsonargparse import ArgumentParser

from seg4diff_jax.command_line.segment import model_arguments, result_arguments, segment_to_files
from seg4diff_jax.pipeline import Pipeline, Segmentation
from seg4diff_jax.segmentation.unsupervised import MERGE_THRESHOLDS, MinMax, check_threshold


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("image", type=str, help="image file")
    defaults = ", ".join(f"{threshold} for {minmax}" for minmax, threshold in MERGE_THRESHOLDS.items())
    add("--threshold", type=float, help=f"maps merge that diverge by less: larger, fewer segments; default: {defaults}")
    add("--minmax", choices=list(get_args(MinMax)), default="pixel", help="what maps are normalised over, first of all")
    result_arguments(parser)
    model_arguments(parser)


def run(options: Any) -> None:
    merging = {"threshold": check_threshold(options.threshold, options.minmax), "minmax": options.minmax}

    def segment(pipe: Pipeline, pixels: np.ndarray, **how: Any) -> Segmentation:
        return pipe.segment_unsupervised(pixels, **merging, **how).named()

    segment_to_files(options, None, segment, merging)
