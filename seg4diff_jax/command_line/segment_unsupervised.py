"""`seg4diff segment-unsupervised IMAGE --model MODEL`: segments an image without class names."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from jsonargparse import ArgumentParser

from seg4diff_jax.command_line.segment import model_arguments, result_arguments, segment_to_files
from seg4diff_jax.pipeline import Pipeline, Segmentation
from seg4diff_jax.segmentation.grouping import THRESHOLDS, Grouping, check_threshold
from seg4diff_jax.segmentation.unsupervised import MERGE_THRESHOLDS, MinMax


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("image", type=str, help="image file")
    add(
        "--grouping",
        choices=list(get_args(Grouping)),
        default="pads",
        help="by maps of an empty prompt's tokens, as in the paper; by image-to-image attention; or by features",
    )
    usual = {"pads by token": MERGE_THRESHOLDS["token"], **THRESHOLDS}
    add(
        "--threshold",
        type=float,
        help="maps merge that diverge by less: larger, fewer segments; diffcut cuts where a cut costs less: larger, "
        f"more; default: {', '.join(f'{threshold} for {name}' for name, threshold in usual.items())}",
    )
    add("--minmax", choices=list(get_args(MinMax)), default="pixel", help="what maps of pads are normalised over")
    result_arguments(parser)
    model_arguments(parser)


def run(options: Any) -> None:
    threshold = check_threshold(options.threshold, options.minmax, options.grouping)
    merging = {"grouping": options.grouping, "threshold": threshold, "minmax": options.minmax}

    def segment(pipe: Pipeline, pixels: np.ndarray, **how: Any) -> Segmentation:
        return pipe.segment_unsupervised(pixels, **merging, **how).named()

    segment_to_files(options, None, segment, merging)
