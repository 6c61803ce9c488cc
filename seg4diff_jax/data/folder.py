"""Any labelled images on disk: `images/`, `labels/` and `classes.txt`.

    DIR/images/NAME.jpg    any format that Pillow reads
    DIR/labels/NAME.png    one channel, as large as the image: line number in classes.txt, from 0; 255 is ignored
    DIR/classes.txt        one class name a line

`seg4diff scenes DIR` writes synthetic scenes in this layout.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from seg4diff_jax.data.loader import Item
from seg4diff_jax.images import read_image
from seg4diff_jax.segmentation.metrics import IGNORED

INDEX_MODES = ("L", "P", "1", "I;16", "I")
"""Pillow's names for images with one whole number a pixel; of an image with a palette the numbers count."""


class FolderError(ValueError):
    """A folder or one of its files cannot be used; the message names it."""


class LabelledFolder:
    """The images of a folder as a random-access source, in alphabetical order.

    Items have `image` uint8 [height, width, 3], `labels` uint8 [height, width] (index into `classes`, or 255) and
    `name`, the file's name without its ending.

    Raises:
      FolderError: a part of the folder is absent or not as described; for an item also when its image cannot be read,
        its label is absent, of another size or holds values that name no class.
      ImageError: an item's image cannot be read.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        for folder in (self.root, self.root / "images", self.root / "labels"):
            if not folder.is_dir():
                raise FolderError(f"{folder}: no such directory; expected a folder with images/, labels/, classes.txt")
        self.classes = read_classes(self.root / "classes.txt")
        files = (path for path in (self.root / "images").iterdir() if not path.name.startswith("."))
        self.files = sorted((path for path in files if path.is_file()), key=lambda path: path.name)
        if not self.files:
            raise FolderError(f"{self.root / 'images'} holds no file: expected images")
        by_name: dict[str, Path] = {}
        for path in self.files:
            if path.stem in by_name:
                raise FolderError(f"{by_name[path.stem]} and {path.name} share one name, and so one label; rename one")
            by_name[path.stem] = path

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Item:
        file = self.files[index]
        label_file = self.root / "labels" / f"{file.stem}.png"
        image, labels = read_image(file), read_labels(label_file, len(self.classes))
        if image.shape[:2] != labels.shape:
            height, width = labels.shape
            raise FolderError(
                f"{label_file} is {height} x {width} pixels and its image {image.shape[0]} x {image.shape[1]}: "
                "expected one size (height x width, after the rotation that the image's EXIF data asks for)"
            )
        return {"image": image, "labels": labels, "name": file.stem}

    def __repr__(self) -> str:
        return f"LabelledFolder({str(self.root)!r})"


def read_classes(file: Path) -> tuple[str, ...]:
    """Class names, one a line. Raises FolderError when one is blank or repeated, or they are none or too many."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{file}: expected class names, one a line, in UTF-8: {error}") from None
    while names and not names[-1]:
        names.pop()
    if not 0 < len(names) <= IGNORED:
        raise FolderError(f"{file} names {len(names)} classes: expected 1 to {IGNORED}")
    for index, name in enumerate(names):
        if not name or name in names[:index]:
            problem = f"repeats {name!r}" if name else "is blank"
            raise FolderError(f"{file}, line {index + 1} {problem}: expected a class name of its own on each line")
    return tuple(names)


def read_labels(file: Path, classes: int) -> UInt8[np.ndarray, "height width"]:
    """Class index of every pixel, or 255. Raises FolderError for a file that is absent, damaged or holds others."""
    try:
        with Image.open(file) as opened:
            mode, values = opened.mode, np.asarray(opened)
    except FileNotFoundError:
        raise FolderError(f"{file}: no such file; expected the label of the image of that name") from None
    except Exception as error:  # Pillow's decoders raise almost anything at a damaged file
        raise FolderError(f"{file}: cannot be read as an image: {error}") from None
    if mode not in INDEX_MODES:
        raise FolderError(f"{file} is an image of mode {mode}: expected one channel that holds class indices")
    values = values.astype(np.int64)
    outside = values[(values != IGNORED) & ((values < 0) | (values >= classes))]
    if outside.size:
        raise FolderError(
            f"{file}: {outside.size} pixels have the value {int(outside[0])}{' and others' * bool(np.ptp(outside))}; "
            f"classes.txt names {classes} classes, so expected 0 to {classes - 1}, or {IGNORED} for what is ignored"
        )
    return values.astype(np.uint8)
