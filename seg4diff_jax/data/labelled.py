"""What the readers of labelled images share: files to pixels and labels, published ids to classes, and messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt8

from seg4diff_jax.data.loader import Item
from seg4diff_jax.image_files import ImageError, read_label_png, read_rgb

INDEX_MODES = ("L", "P", "1", "I;16", "I")
"""Pillow's names for images with one whole number a pixel; of an image with a palette the numbers count."""
SYNONYMS = {"validation": "val", "val": "validation", "training": "train", "train": "training"}
"""Other words for splits."""


class FolderError(ValueError):
    """A folder or one of its files cannot be used; the message names it."""


@runtime_checkable
class Labels(Protocol):
    """The labels of a set's images, by the image's number."""

    def __call__(self, index: int, /) -> UInt8[np.ndarray, "height width"]:
        """Class of every pixel, or 255. Raises FolderError when there is no such label or it cannot be used."""
        ...

    def place(self, index: int, /) -> str:
        """Where the label is read from, for messages."""
        ...


@dataclass(frozen=True)
class LabelledImages:
    """Images and their labels as a random-access source; files are opened when an item is read.

    Items have `image` uint8 [height, width, 3], `labels` uint8 [height, width] (class, or 255) and `name`.

    Attributes:
      split: the set's own name of the part that this is.
      kind: which of the labels that a set has are read, where it has several.

    Raises, for an item:
      FolderError: its label is absent, damaged, of another size, or holds an id that the set does not have.
      ImageError: its image cannot be read.
    """

    names: Sequence[str]
    images: Sequence[Path]
    labels: Labels
    split: str = ""
    kind: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> Item:
        labels = self.labels(index)
        image = read_fitting(self.images[index], labels.shape, self.labels.place(index))
        return {"image": image, "labels": labels, "name": self.names[index]}


@dataclass(frozen=True)
class PngLabels:
    """Labels that are images of one channel, a file each."""

    files: Sequence[Path]
    classes: IdTable

    def __call__(self, index: int, /) -> UInt8[np.ndarray, "height width"]:
        return self.classes(read_values(self.files[index]), self.place(index))

    def place(self, index: int, /) -> str:
        return str(self.files[index])


class IdTable:
    """Published ids to classes.

    Args:
      classes: class of each id that may occur, 255 for what is ignored.
      expected: which ids those are, for messages.
    """

    def __init__(self, classes: Mapping[int, int], expected: str):
        self.expected = expected
        self._class_of = np.full(max(classes) + 1, -1, np.int16)
        self._class_of[list(classes)] = list(classes.values())

    def __call__(self, ids: Integer[np.ndarray, "*shape"], place: str) -> UInt8[np.ndarray, "*shape"]:
        """Raises FolderError when another id occurs; the message names `place`."""
        inside = (ids >= 0) & (ids < len(self._class_of))
        classes = np.where(inside, self._class_of[np.where(inside, ids, 0)], -1)
        unknown = ids[classes < 0]
        if unknown.size:
            least, largest = unknown.min(), unknown.max()
            values = f"the value {least}" if least == largest else f"values from {least} to {largest}"
            raise FolderError(f"{place}: {unknown.size} pixels have {values}; {self.expected}")
        return classes.astype(np.uint8)


def read_values(file: Path | bytes, name: str = "") -> Integer[np.ndarray, "height width"]:
    """The number that each pixel of a label image holds; no EXIF rotation applies.

    Args:
      file: a file, or what is in one.
      name: for messages, if it is no file.

    Raises FolderError when the file is absent or no such image.
    """
    name = name or str(file)
    mode, values = read_stored(file, name)
    if mode not in INDEX_MODES:
        raise FolderError(f"{name} is an image of mode {mode}: expected one channel that holds class indices")
    return values


def read_stored(file: Path | bytes, name: str) -> tuple[str, np.ndarray]:
    """A label image's mode, as Pillow calls it, and the numbers of its pixels. Raises FolderError when it cannot."""
    try:
        return read_label_png(file, name)
    except FileNotFoundError:
        raise FolderError(f"{name}: {_nothing(file)}; expected the label of the image of that name") from None
    except ImageError as error:
        raise FolderError(str(error)) from None


def read_fitting(
    file: Path | bytes, size: tuple[int, ...], label: str, name: str = ""
) -> UInt8[np.ndarray, "height width 3"]:
    """An image as large as its label: turned as its EXIF data asks for, unless only the pixels as stored fit.

    Labels of published sets were drawn on either. Where both fit, EXIF counts.

    Args:
      file: a file, or what is in one.
      size: height and width of the label.
      label: where the label is, for messages.
      name: where the image is, for messages, if that is no file.

    Raises:
      ImageError: the image cannot be read.
      FolderError: the label is of another size.
    """
    name = name or str(file)
    image = _pixels(file, name)
    if image.shape[:2] == size[::-1] != size:
        stored = _pixels(file, name, as_stored=True)
        image = stored if stored.shape[:2] == size else image
    if image.shape[:2] != size:
        raise FolderError(
            f"{label} is {size[0]} x {size[1]} pixels and its image {image.shape[0]} x {image.shape[1]} ({name}): "
            "expected one size (height x width, after the rotation that the image's EXIF data asks for)"
        )
    return image


def _pixels(file: Path | bytes, name: str, as_stored: bool = False) -> UInt8[np.ndarray, "height width 3"]:
    try:
        return read_rgb(file, name, turned=not as_stored)
    except FileNotFoundError:
        raise ImageError(f"{name}: {_nothing(file)}") from None


def _nothing(file: Path | bytes) -> str:
    return "a link to nothing" if isinstance(file, Path) and file.is_symlink() else "no such file"


# ---- where things lie -----------------------------------------------------------------------------------------------


def first_of(root: str | Path, places: Sequence[str], origin: str) -> Path:
    """The first of some places under `root` that is there.

    Args:
      origin: what is expected and where it comes from, for messages.

    Raises FolderError when none is.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FolderError(f"{root}: no such directory; expected {origin}")
    for place in places:
        if (root / place).exists():
            return root / place
    raise FolderError(f"{root} holds no {' or '.join(places)}; expected {origin}")


def visible(paths: Iterable[Path]) -> list[Path]:
    """Without those whose name starts with a dot: what systems write beside images is none."""
    return [path for path in paths if not path.name.startswith(".")]


def images_in(directory: Path, pattern: str, origin: str) -> list[Path]:
    """Files in alphabetical order of their names. Raises FolderError when there are none, or a folder is lost."""
    if "/" in pattern and (lost := [path for path in sorted(visible(directory.iterdir())) if not path.exists()]):
        raise FolderError(f"{lost[0]} is a link to nothing; expected {origin}")
    files = [path for path in visible(directory.glob(pattern)) if not path.parent.name.startswith(".")]
    files.sort(key=lambda path: path.name)
    if not files:
        raise FolderError(f"{directory} holds no {pattern}; expected {origin}")
    return files


def published_split(split: str | None, splits: Sequence[str], name: str) -> str:
    """A set's own name of a split: `val` and `validation` are one, and so are `train` and `training`.

    Args:
      split: default: the first of `splits`.

    Raises ValueError for a split that the set does not have.
    """
    for word in (split or splits[0], SYNONYMS.get(split or "", "")):
        if word in splits:
            return word
    raise ValueError(f"data.split is {split!r}: {name} has {', '.join(splits)}")


def published_kind(kind: str | None, kinds: Sequence[str], name: str) -> str | None:
    """Which labels are asked for, None for any. Raises ValueError for those that the set does not have."""
    if kind is not None and kind not in kinds:
        has = f"has {' and '.join(kinds)}" if kinds else "has labels of one kind: leave it out"
        raise ValueError(f"data.labels is {kind!r}: {name} {has}")
    return kind
