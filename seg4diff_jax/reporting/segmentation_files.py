"""Writes the segmentation of one image as a directory of files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from seg4diff_jax.reporting.colors import class_colors
from seg4diff_jax.reporting.overlays import CELL_LONGEST, heat_picture, heat_sheet, overlay, save_labels, shares, tidy

if TYPE_CHECKING:
    from seg4diff_jax.pipeline import Segmentation

RECORD = "segmentation.json"
"""The file that is written last: a directory that has it is complete."""
STAGES = "stages.png"
"""What `draw_stages` drew, where that was asked for."""
FILES = ("overlay.png", "labels.png", "heatmaps.png", "heatmaps/", "scores.npz", RECORD)
CLASS_MASKS = "binary"
"""The folder of `write_class_masks`."""
HEAT_LONGEST = 1024
PACKED = 4
"""Level of PNGs: 2.5 times as fast as zlib's usual 6, for files that are up to 4 % larger."""


def write_segmentation(
    directory: Path, pixels: UInt8[np.ndarray, "height width 3"], segmentation: Segmentation, record: Mapping[str, Any]
) -> dict[str, float]:
    """Writes a segmentation as pictures and data. Files of an earlier segmentation are replaced.

    labels.png            class index of every pixel, at the image's size, shown in the classes' colours
    overlay.png           the masks over the image, with a legend
    heatmaps/NN_name.png  heat map of each class's scores; heatmaps.png: all of them
    scores.npz            `scores` float32 [classes, rows, columns] on the model's grid, and `classes`
    segmentation.json     `record`; the prompts; each class's name, colour, share of the pixels and range of scores

    Returns each class's share of the pixels.
    """
    classes, scores = segmentation.classes, segmentation.scores
    directory.mkdir(parents=True, exist_ok=True)
    for former in (RECORD, STAGES):
        (directory / former).unlink(missing_ok=True)
    parts = shares(segmentation.labels, len(classes))
    save_labels(directory / "labels.png", segmentation.labels, len(classes))
    overlay(pixels, segmentation.labels, classes).save(directory / "overlay.png", compress_level=PACKED)
    write_heat_maps(directory, pixels, segmentation)
    np.savez_compressed(directory / "scores.npz", scores=scores, classes=np.array(classes))
    described = [
        {
            "index": index,
            "name": name,
            "color": "#{:02x}{:02x}{:02x}".format(*color),
            "share": float(part),
            "score_range": [float(score.min()), float(score.max())],
        }
        for index, (name, color, part, score) in enumerate(
            zip(classes, class_colors(len(classes)), parts, scores, strict=True)
        )
    ]
    contents = {**record, "classes": described, "prompts": list(segmentation.prompts)}
    (directory / RECORD).write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return dict(zip(classes, parts.tolist(), strict=True))


def write_heat_maps(directory: Path, pixels: UInt8[np.ndarray, "height width 3"], segmentation: Segmentation) -> None:
    """Writes the heat map of each class, and a contact sheet of all. Earlier heat maps are deleted."""
    folder = directory / "heatmaps"
    folder.mkdir(exist_ok=True)
    remove_class_files(folder)
    image = Image.fromarray(pixels)
    image.thumbnail((HEAT_LONGEST, HEAT_LONGEST), Image.Resampling.LANCZOS)
    small, maps = np.asarray(image), []
    files = class_files(segmentation.classes)
    for file, name, score in zip(files, segmentation.classes, segmentation.scores, strict=True):
        picture = heat_picture(small, score, HEAT_LONGEST)
        picture.save(folder / file, compress_level=2)
        picture.thumbnail((CELL_LONGEST, CELL_LONGEST), Image.Resampling.BOX)
        maps.append((name, score, picture))
    heat_sheet(small, maps).save(directory / "heatmaps.png", compress_level=PACKED)


def write_class_masks(directory: Path, segmentation: Segmentation) -> None:
    """Writes each class's mask as binary/NN_name.png, 8-bit grey at the image's size: 255 for the class, 0 elsewhere.

    Earlier ones are deleted.
    """
    folder = directory / CLASS_MASKS
    folder.mkdir(parents=True, exist_ok=True)
    remove_class_files(folder)
    for index, file in enumerate(class_files(segmentation.classes)):
        Image.fromarray(np.where(segmentation.labels == index, np.uint8(255), np.uint8(0))).save(folder / file)


def remove_segmentation(directory: Path) -> None:
    """Removes what `write_segmentation` and `write_class_masks` write, and the directory if nothing else is in it."""
    folders = [path for name in ("heatmaps", CLASS_MASKS) if not (path := directory / name).is_symlink()]
    for file in (directory / name for name in (*FILES, STAGES) if not name.endswith("/")):
        if file.is_file() or file.is_symlink():
            file.unlink()
    for folder in folders:
        remove_class_files(folder)
    for folder in (*folders, directory):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def remove_class_files(folder: Path) -> None:
    """Removes files that are named as those of `class_files`."""
    for former in folder.glob("[0-9][0-9]*_*.png"):
        former.unlink()


def class_files(classes: Sequence[str]) -> list[str]:
    """Returns a file name for each class, such as 00_cat.png."""
    digits = max(2, len(str(len(classes) - 1)))
    return [f"{index:0{digits}}_{file_name(name)}.png" for index, name in enumerate(classes)]


def file_name(name: str) -> str:
    """Returns a class name in a form that can be part of a file name."""
    return re.sub(r"[^\w-]+", "_", tidy(name)).strip("_")[:48] or "class"
