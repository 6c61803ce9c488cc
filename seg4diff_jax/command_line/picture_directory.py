"""A directory of generated pictures: their names, the record of all, a grid of the first, an interrupted run's rest.

generation.json   how the pictures were made, and each one's file and prompt; written last, so that it means: complete
grid.png          the first pictures, under their prompts
clip_scores.csv   scores by CLIP, if they were asked for
progress/         of an unfinished run: what it was asked for
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from seg4diff_jax.convert.files import read_json
from seg4diff_jax.interrupted_runs import DIRECTORY, RUN, UNFINISHED, write_whole
from seg4diff_jax.quoting import quoted
from seg4diff_jax.reporting.overlays import contact_sheet
from seg4diff_jax.reporting.segmentation_files import file_name, remove_segmentation

Layout = Literal["numbered", "compbench"]
RECORD, GRID, SCORES = "generation.json", "grid.png", "clip_scores.csv"
SAMPLES = "samples"
"""The folder in which the scorers of T2I-CompBench++ look for pictures. They read every file in it."""
MOST_NAME_BYTES = 255
"""Of a file's name, on the usual file systems."""
UNREADABLE = {
    r"[\x00-\x1f\x7f]": "a name should hold no control character",
    r"/": "a name holds no slash",
    r"_": "an underscore begins the picture's number",
    r"\.png": "that ends the name",
}
"""What no prompt may have that is read from a file's name, and why."""
CELL = 256, 512
"""Shortest and longest side of a picture in the grid, in pixels."""
MOST_IN_GRID = 48


class Picture(NamedTuple):
    """A picture that a record names: its file, from the directory on, and its prompt."""

    file: str
    prompt: str


# ---- names ----------------------------------------------------------------------------------------------------------


def picture_files(prompts: Sequence[str], count: int, layout: Layout) -> list[str]:
    """Returns the files of `count` pictures of each prompt. Raises ValueError for a prompt that can name no file."""
    return sample_names(prompts, count) if layout == "compbench" else file_names(prompts, count)


def file_names(prompts: Sequence[str], count: int) -> list[str]:
    """Returns file names such as 00_a_cat.png, or 00_a_cat_1.png with several pictures per prompt."""
    digits, own = max(2, len(str(len(prompts) - 1))), len(str(count))
    numbers = [""] if count == 1 else [f"_{number:0{own}}" for number in range(1, count + 1)]
    return [
        f"{index:0{digits}}_{readable(prompt)}{number}.png"
        for index, prompt in enumerate(prompts)
        for number in numbers
    ]


def sample_names(prompts: Sequence[str], count: int) -> list[str]:
    """Returns files as T2I-CompBench++'s scorers read them, such as samples/a green bench_000000.png.

    The scorers take for the prompt what is before the first underscore, and for the picture's number what follows it.
    Numbers go on from prompt to prompt, and prompts keep their order: the score of complex prompts needs both.

    Raises ValueError for a prompt that they would read otherwise, or whose file name would be too long.
    """
    names = []
    for number, prompt in enumerate(prompts, 1):
        said = (
            f"prompt {number}, {quoted(prompt)}, cannot be read from a file's name, as T2I-CompBench++'s scorers do: "
        )
        for unreadable, why in UNREADABLE.items():
            if found := re.search(unreadable, prompt):
                raise ValueError(f"{said}it has {found[0]!r}, and {why}; leave it out")
        names += [f"{prompt}_{len(names) + place:06}.png" for place in range(count)]
        if (size := len(names[-1].encode())) > MOST_NAME_BYTES:
            raise ValueError(f"{said}the name would have {size} bytes, of at most {MOST_NAME_BYTES}; shorten it")
    return [f"{SAMPLES}/{name}" for name in names]


def readable(prompt: str) -> str:
    return file_name(prompt) if re.search(r"\w", prompt) else "picture"


# ---- writing and removing -------------------------------------------------------------------------------------------


def write_picture(out: Path, file: str, picture: UInt8[np.ndarray, "height width 3"]) -> None:
    """Writes a picture of an unfinished run, so that it is complete or absent."""
    encoded = BytesIO()
    Image.fromarray(picture).save(encoded, "PNG")
    write_whole(out / DIRECTORY, out / file, encoded.getvalue())


def remove_former(out: Path) -> None:
    """Removes the files of an earlier run that its record names, or an unfinished run's, and nothing else."""
    for record in (Path(RECORD), Path(DIRECTORY) / RUN):
        try:
            pictures = read_json(out / record)["pictures"]
            former = {RECORD, GRID, SCORES, *(picture["file"] for picture in pictures)}
            masks = {picture["masks"] for picture in pictures if "masks" in picture}
        except (ValueError, KeyError, TypeError):
            continue
        for folder in (out, out / SAMPLES):
            if folder != out and (folder.is_symlink() or not folder.is_dir()):
                continue
            for path in folder.iterdir():
                name = path.relative_to(out).as_posix()
                if name in former and (path.is_file() or path.is_symlink()):
                    path.unlink()
                elif name in masks and path.is_dir() and not path.is_symlink():
                    remove_segmentation(path)
    if (samples := out / SAMPLES).is_dir() and not samples.is_symlink() and not any(samples.iterdir()):
        samples.rmdir()
    remove_progress(out)


def remove_progress(out: Path) -> None:
    """Removes what says that a run is unfinished."""
    directory = out / DIRECTORY
    for name in (UNFINISHED, RUN):
        (directory / name).unlink(missing_ok=True)
    if directory.is_dir() and not directory.is_symlink() and not any(directory.iterdir()):
        directory.rmdir()


def grid(prompts: Sequence[str], count: int, pictures: Iterable[UInt8[np.ndarray, "height width 3"]]) -> Image.Image:
    """Draws pictures in a grid, under their prompts. Small pictures are enlarged, large ones reduced.

    Args:
      prompts: one for each picture.
      count: pictures of each prompt.
      pictures: of one size, of which one is in memory at a time.
    """
    cells = []
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        height, width = picture.shape[:2]
        scale = min(max(1.0, CELL[0] / min(height, width)), CELL[1] / max(height, width))
        cell = max(1, round(scale * width)), max(1, round(scale * height))
        number = f"{index % count + 1} of {count}" if count > 1 else ""
        cells.append((prompt, number, Image.fromarray(picture).resize(cell, Image.Resampling.LANCZOS)))
    return contact_sheet(cells)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_pictures(directory: Path) -> tuple[dict[str, Any], list[Picture]]:
    """Returns the record of a finished run, and the pictures that it names, all of which are there.

    Raises ValueError, which names the file, where that is not so.
    """
    path = directory / RECORD
    unfinished = (directory / DIRECTORY).is_dir() and not path.exists()
    why = "its run is not finished: give --resume to go on" if unfinished else "expected what `seg4diff generate` wrote"
    record = read_json(path, why)
    pictures = record.get("pictures")
    if not isinstance(pictures, list) or not pictures:
        raise ValueError(f"{path}: pictures is {quoted(pictures)}; expected a list of files and their prompts")
    found = []
    for number, each in enumerate(pictures):
        file, prompt = (each.get("file"), each.get("prompt")) if isinstance(each, dict) else (None, None)
        if not (isinstance(file, str) and isinstance(prompt, str)):
            raise ValueError(f"{path}: picture {number} is {quoted(each)}; expected its file and its prompt")
        found.append(Picture(file, prompt))
    if absent := [each.file for each in found if not os.path.isfile(directory / each.file)]:  # False for any name
        raise ValueError(f"{directory}: no file {quoted(absent[0])}, which {RECORD} names: make the pictures anew")
    return record, found
