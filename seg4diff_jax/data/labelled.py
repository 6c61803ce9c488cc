"""Shared by the readers of labelled images: reads pixels and labels, maps published ids to classes, finds files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt8

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.loader import Item
from seg4diff_jax.image_files import ImageError, read_label_png, read_rgb

INDEX_MODES = ("L", "P", "1", "I;16", "I")
"""Pillow's modes of images with one whole number per pixel. With a palette, the number is the index."""
SYNONYMS = {"validation": "val", "val": "validation", "training": "train", "train": "training"}
"""Other names of splits."""


@runtime_checkable
class Labels(Protocol):
    """A function from an image's number to its labels."""

    def __call__(self, index: int, /) -> UInt8[np.ndarray, "height width"]:
        """Returns the class of every pixel, or 255. Raises FolderError if the label is absent or cannot be used."""
        ...

    def place(self, index: int, /) -> str:
        """Returns the place from which the label is read, for messages."""
        ...


@dataclass(frozen=True)
class LabelledImages:
    """A random-access source of images and their labels. Files are opened when an item is read.

    Items have `image` uint8 [height, width, 3], `labels` uint8 [height, width] (class, or 255) and `name`.

    Attributes:
      split: the set's own name of the split.
      kind: the kind of labels that are read, for a set with several kinds.
      objects: what the object of each image is called, for a set whose labels are foreground and background.

    Raises, for an item:
      FolderError: its label is absent, damaged, of another size, or holds an id that the set does not have.
      ImageError: its image cannot be read.
    """

    names: Sequence[str]
    images: Sequence[Path]
    labels: Labels
    split: str = ""
    kind: str = ""
    objects: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> Item:
        labels = self.labels(index)
        image = read_fitting(self.images[index], labels.shape, self.labels.place(index))
        return {"image": image, "labels": labels, "name": self.names[index]}


@dataclass(frozen=True)
class PngLabels:
    """Labels that are one-channel PNG files, one for each image."""

    files: Sequence[Path]
    classes: IdTable

    def __call__(self, index: int, /) -> UInt8[np.ndarray, "height width"]:
        return self.classes(read_values(self.files[index]), self.place(index))

    def place(self, index: int, /) -> str:
        return str(self.files[index])


class IdTable:
    """A table that maps published ids to classes.

    Args:
      classes: class of each id that may occur; 255 for ignored ids.
      expected: description of these ids, for messages.
    """

    def __init__(self, classes: Mapping[int, int], expected: str):
        self.expected = expected
        self._class_of = np.full(max(classes) + 1, -1, np.int16)
        self._class_of[list(classes)] = list(classes.values())

    def __call__(self, ids: Integer[np.ndarray, "*shape"], place: str) -> UInt8[np.ndarray, "*shape"]:
        """Maps ids to classes. Raises FolderError if any other id occurs; the message names `place`."""
        inside = (ids >= 0) & (ids < len(self._class_of))
        classes = np.where(inside, self._class_of[np.where(inside, ids, 0)], -1)
        unknown = ids[classes < 0]
        if unknown.size:
            least, largest = unknown.min(), unknown.max()
            values = f"the value {least}" if least == largest else f"values from {least} to {largest}"
            raise FolderError(f"{place}: {unknown.size} pixels have {values}; {self.expected}")
        return classes.astype(np.uint8)


def read_values(file: Path | bytes, name: str = "") -> Integer[np.ndarray, "height width"]:
    """Returns the number that each pixel of a label image holds. No EXIF rotation is applied.

    Args:
      file: a file, or the bytes of one.
      name: name of the image in messages. Default: the file.

    Raises FolderError if the file is absent, cannot be read or does not have one channel.
    """
    name = name or str(file)
    mode, values = read_stored(file, name)
    if mode not in INDEX_MODES:
        raise FolderError(f"{name} is an image of mode {mode}: expected one channel that holds class indices")
    return values


def read_stored(file: Path | bytes, name: str) -> tuple[str, np.ndarray]:
    """Returns Pillow's mode of a label image, and its pixels' numbers. Raises FolderError if it cannot be read."""
    try:
        return read_label_png(file, name)
    except FileNotFoundError:
        raise FolderError(f"{name}: {_nothing(file)}; expected the label of the image of that name") from None
    except ImageError as error:
        raise FolderError(str(error)) from None


def read_fitting(
    file: Path | bytes, size: tuple[int, ...], label: str, name: str = ""
) -> UInt8[np.ndarray, "height width 3"]:
    """Reads an image that has the size of its label. It is rotated as its EXIF data asks, if it then fits.

    Labels of published sets were drawn on rotated images or on images as stored. If only the image as stored fits, it
    is not rotated.

    Args:
      file: a file, or the bytes of one.
      size: height and width of the label.
      label: place of the label, for messages.
      name: place of the image, for messages. Default: the file.

    Raises:
      ImageError: the image cannot be read.
      FolderError: the label has another size.
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
    """Returns the first of some paths under `root` that exists.

    Args:
      origin: what is expected and where it comes from, for messages.

    Raises FolderError if none exists.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FolderError(f"{root}: no such directory; expected {origin}")
    for place in places:
        if (root / place).exists():
            return root / place
    raise FolderError(f"{root} holds no {' or '.join(places)}; expected {origin}")


def visible(paths: Iterable[Path]) -> list[Path]:
    """Returns the paths whose names do not begin with a dot. Systems write such hidden files beside images."""
    return [path for path in paths if not path.name.startswith(".")]


def images_in(directory: Path, pattern: str, origin: str) -> list[Path]:
    """Returns the files of a pattern, in alphabetical order of their names.

    Raises FolderError if there are none, or if a folder is a broken link.
    """
    if "/" in pattern and (lost := [path for path in sorted(visible(directory.iterdir())) if not path.exists()]):
        raise FolderError(f"{lost[0]} is a link to nothing; expected {origin}")
    files = [path for path in visible(directory.glob(pattern)) if not path.parent.name.startswith(".")]
    files.sort(key=lambda path: path.name)
    if not files:
        raise FolderError(f"{directory} holds no {pattern}; expected {origin}")
    return files


def published_split(split: str | None, splits: Sequence[str], name: str) -> str:
    """Returns a set's own name of a split. `val` means `validation` too, and `train` means `training`.

    Args:
      split: default: the first of `splits`.
      name: name of the set, for messages.

    Raises ValueError for a split that the set does not have.
    """
    for word in (split or splits[0], SYNONYMS.get(split or "", "")):
        if word in splits:
            return word
    raise ValueError(f"data.split is {split!r}: {name} has {', '.join(splits)}")


def published_kind(kind: str | None, kinds: Sequence[str], name: str) -> str | None:
    """Returns the kind of labels unchanged, None for any. Raises ValueError for a kind that the set does not have."""
    if kind is not None and kind not in kinds:
        has = f"has {' and '.join(kinds)}" if kinds else "has labels of one kind: leave it out"
        raise ValueError(f"data.labels is {kind!r}: {name} {has}")
    return kind
