"""Reads ImageNet-Segmentation: 4276 images of 445 classes with the mask of the object (Guillaumin et al., IJCV 2014).

As it is published, one file of MATLAB's version 7.3, which is HDF5, beside ImageNet's list of its classes' names:

    DIR/gtsegs_ijcv.mat
    DIR/words.txt              a class and its names a line, as in "n01440764<tab>tench, Tinca tinca"

Or as files, where somebody has unpacked it, or made a set of the same kind:

    DIR/images/NAME.jpg        any format that Pillow reads
    DIR/masks/NAME.png         one channel, as large as the image: 0 background, 1 or 255 foreground
    DIR/names.txt              an image and the name of its object a line, as in "NAME<tab>tench"

The structure of the file is that which public loaders index: Chefer et al.'s `data/Imagenet.py` (img, gt) and
ConceptAttention's `experiments/imagenet_segmentation/data_processing.py` (img, gt, id):

    value/img [images, 1]      references to pixels, uint8 [3, width, height]: MATLAB's axes come out reversed
    value/gt  [images, 1]      references to a cell of references [.., 1]; the first is the mask [width, height], 0 or 1
    value/id  [images, 1]      references to the characters of "n01440764_10026", 16 bits each

Its other members are not read. The class is the part of the id before the underscore, and its name the first that
words.txt gives, which is that of WordNet's first lemma.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.labelled import (
    IdTable,
    LabelledImages,
    PngLabels,
    first_of,
    published_kind,
    published_split,
    visible,
)
from seg4diff_jax.data.loader import Item
from seg4diff_jax.data.single_objects import BACKGROUND, FOREGROUND
from seg4diff_jax.data.text_files import read_lines
from seg4diff_jax.quoting import cut, quoted

FILE, WORDS, NAMES = "gtsegs_ijcv.mat", "words.txt", "names.txt"
ORIGIN = f"{FILE} (calvin-vision.net) with ImageNet's {WORDS}, or images/, masks/ and {NAMES}, one object in each image"
IDS = {0: BACKGROUND, 1: FOREGROUND}
MASK = IdTable(IDS, "expected 0 for background and 1 for foreground")
MASK_FILE = IdTable({**IDS, 255: FOREGROUND}, "expected 0 for background and 1, or 255, for foreground")
SPLITS = ("val",)
"""It is one set, which is all for testing."""
MEMBERS = IMAGES, MASKS, IMAGE_IDS = "value/img", "value/gt", "value/id"


def read_imagenet(
    root: str | Path, split: str | None, kind: str | None, ids: Mapping[int, int]
) -> LabelledImages | MatlabImages:
    """Returns all images, in the file's order or in that of names.txt.

    Args:
      root: directory with the file or the folders.
      split, kind: none but val and the only one.
      ids: class of each value of a mask; both forms have a table of their own.

    Raises FolderError if a file is missing or not as described, ValueError for another split or kind.
    """
    published_split(split, SPLITS, "ImageNet-Segmentation")
    published_kind(kind, (), "ImageNet-Segmentation")
    found = first_of(root, (FILE, NAMES), ORIGIN)
    return MatlabImages.open(found) if found.name == FILE else _read_folder(found.parent)


def _read_folder(root: Path) -> LabelledImages:
    folder = first_of(root, ("images",), ORIGIN)
    by_name: dict[str, Path] = {}
    for path in visible(sorted(folder.iterdir())):
        if path.stem in by_name:
            raise FolderError(f"{by_name[path.stem]} and {path.name} share one name, and so one mask; rename one")
        by_name[path.stem] = path
    named = _listed(root / NAMES, "an image and the name of its object a line, with a tab between them")
    if absent := [name for name in named if name not in by_name]:
        raise FolderError(f"{root / NAMES} names {absent[0]}, of which {folder} has no image")
    if unlisted := [path.name for name, path in by_name.items() if name not in named]:
        raise FolderError(f"{root / NAMES} does not say what the object of images/{unlisted[0]} is called")
    masks = first_of(root, ("masks",), ORIGIN)
    labels = PngLabels([masks / f"{name}.png" for name in named], MASK_FILE)
    return LabelledImages([*named], [by_name[name] for name in named], labels, "val", objects=tuple(named.values()))


def _listed(file: Path, expected: str) -> dict[str, str]:
    """Returns what follows the first tab of each line, by what precedes it.

    Raises FolderError, which names the line, for a line without either and for one that comes twice.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(read_lines(file, expected), start=1):
        key, _, named = (part.strip() for part in line.partition("\t"))
        if not key or not named:
            raise FolderError(f"{file}, line {number} is {quoted(line)}; expected {expected}")
        if key in found:
            raise FolderError(f"{file}, line {number} names {key} again; expected each once")
        found[key] = named
    if not found:
        raise FolderError(f"{file} is empty; expected {expected}")
    return found


@dataclass(frozen=True)
class MatlabImages:
    """The images of the published file. It is opened anew for each item, so that threads and processes may share it.

    Items have `image` uint8 [height, width, 3], `labels` uint8 [height, width] (foreground or background) and `name`.

    Attributes:
      names: the images' ids.
      objects: the name of each image's class.

    Raises FolderError, for an item, if it is not as the module says.
    """

    file: Path
    names: Sequence[str]
    objects: tuple[str, ...]
    split: str = "val"
    kind: str = ""

    @classmethod
    def open(cls, file: Path) -> MatlabImages:
        """Reads all ids, and what their classes are called. Raises FolderError if either is not as described."""
        with _opened(file) as members:
            lengths = {name: len(member) for name, member in members.items()}
            if len({*lengths.values()}) > 1 or not lengths[IMAGES]:
                told = ", ".join(f"{length} in {name}" for name, length in lengths.items())
                raise FolderError(f"{file} has {told}: expected as many of each, and at least one")
            ids = [_id(members, index, f"{file}, image {index + 1}") for index in range(lengths[IMAGES])]
        words = _listed(file.parent / WORDS, 'a class and its names a line, as in "n01440764<tab>tench, Tinca tinca"')
        for index, name in enumerate(ids):
            if _class_of(name) not in words:
                raise FolderError(
                    f"{file.parent / WORDS} has no line for {_class_of(name)}, the class of image {index + 1} ({name})"
                )
        return cls(file, ids, tuple(words[_class_of(name)].split(",")[0].strip() for name in ids))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> Item:
        place = f"{self.file}, image {index + 1} ({self.names[index]})"
        with _opened(self.file) as members:
            image, mask = _pixels(members, index, place), _mask(members, index, place)
        if image.shape[:2] != mask.shape:
            raise FolderError(
                f"{place}: the mask is {mask.shape[0]} x {mask.shape[1]} pixels and the image {image.shape[0]} x "
                f"{image.shape[1]}: expected one size (height x width)"
            )
        return {"image": image, "labels": MASK(mask, place), "name": self.names[index]}


Members = Mapping[str, Any]
"""HDF5's data sets of `MEMBERS`, by name."""


@contextmanager
def _opened(file: Path) -> Iterator[Members]:
    """Opens the file for reading. Raises FolderError if it is absent, not HDF5, or lacks a member."""
    import h5py

    if not file.is_file():
        raise FolderError(f"{file}: no such file; expected {ORIGIN}")
    if not h5py.is_hdf5(file):
        raise FolderError(f"{file} is not HDF5, as MATLAB's version 7.3 writes it; expected {ORIGIN}")
    with _said_of(str(file)), h5py.File(file, "r") as opened:
        members = {name: opened.get(name) for name in MEMBERS}
        for name, member in members.items():
            if not isinstance(member, h5py.Dataset) or member.ndim != 2 or member.dtype != h5py.ref_dtype:
                raise FolderError(f"{file} has no {name} of [images, 1] references; expected {ORIGIN}")
        yield members


@contextmanager
def _said_of(place: str) -> Iterator[None]:
    """Turns what h5py raises at a damaged file, which may be almost anything, into a FolderError that names it."""
    try:
        yield
    except (FolderError, MemoryError):
        raise
    except Exception as error:
        raise FolderError(f"{place} cannot be read: {cut(str(error))}") from None


def _array(members: Members, name: str, index: int, place: str) -> np.ndarray:
    """Returns the array that a member refers to."""
    import h5py

    with _said_of(f"{place}, {name}"):
        member = members[name]
        found = member.file[member[index, 0]]
        if name == MASKS and isinstance(found, h5py.Dataset) and found.dtype == h5py.ref_dtype:
            found = member.file[found[0, 0]]
        array = np.asarray(found[()])
    if array.dtype not in (np.uint8, np.uint16, np.bool_):
        raise FolderError(f"{place}, {name} holds values of type {array.dtype}; expected whole numbers of 8 or 16 bits")
    return array


def _pixels(members: Members, index: int, place: str) -> UInt8[np.ndarray, "height width 3"]:
    array = _array(members, IMAGES, index, place)
    if array.ndim != 3 or array.shape[0] != 3 or not array.size or array.dtype != np.uint8:
        raise FolderError(f"{place}, {IMAGES} is {array.dtype} {list(array.shape)}; expected uint8 [3, width, height]")
    return np.ascontiguousarray(array.transpose(2, 1, 0))


def _mask(members: Members, index: int, place: str) -> np.ndarray:
    array = _array(members, MASKS, index, place)
    if array.ndim != 2 or not array.size:
        raise FolderError(f"{place}, {MASKS} is {array.dtype} {list(array.shape)}; expected [width, height]")
    return array.T.astype(np.int32)


def _id(members: Members, index: int, place: str) -> str:
    text = "".join(map(chr, _array(members, IMAGE_IDS, index, place).ravel().tolist())).strip()
    if not re.fullmatch(r"n\d{8}_\S+", text):
        raise FolderError(f"{place}, {IMAGE_IDS} is {quoted(text)}; expected one such as n01440764_10026")
    return text


def _class_of(name: str) -> str:
    return name.split("_")[0]
