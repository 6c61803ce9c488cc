"""Folders of pictures whose masks have no names, as SA-1B's."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from seg4diff_jax.miniature.world.shapes import scene


def write_nameless(folder, run_lengths) -> None:
    """Two pictures; masks are a large, a small and a tiny square."""
    for number in (1, 2):
        Image.fromarray(scene("train", number, 64).image).save(folder / f"sa_{number}.jpg")
        annotations = []
        for side in (3, 16, 40):
            mask = np.zeros((64, 64), np.uint8, order="F")
            mask[:side, :side] = 1
            encoded = run_lengths.encode(mask)
            encoded["counts"] = encoded["counts"].decode()
            annotations.append({"segmentation": encoded, "area": side**2})
        (folder / f"sa_{number}.json").write_text(json.dumps({"annotations": annotations}))
    (folder / "captions.json").write_text(json.dumps({"1": "A ball. On sand. And more."}))
