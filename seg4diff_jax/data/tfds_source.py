"""Reads sets with images and label maps that tensorflow-datasets has prepared as ArrayRecord, without TensorFlow.

    DIR/dataset_info.json, DIR/features.json, DIR/NAME-SPLIT.array_record-00000-of-00001 ...
    DIR/classes.txt    one class name a line, if the set itself names no classes

Prepare a set once, on a machine with TensorFlow, by `download_and_prepare(file_format="array_record")`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.folder import listed_ids, read_classes
from seg4diff_jax.data.labelled import first_of, published_kind, published_split, read_fitting, read_values
from seg4diff_jax.data.loader import Item
from seg4diff_jax.quoting import cut

INFO, CLASSES = "dataset_info.json", "classes.txt"
DEPTH = 4
"""Levels of directories in which a prepared set is searched: the given one, and NAME/CONFIG/VERSION below it."""
FIRST_SPLITS = ("validation", "val", "test", "train")
"""The default split is the first of these that the set has."""
PREPARED = "a set that tensorflow-datasets has prepared with file_format='array_record'"


class PreparedSet:
    """A random-access source of the images of a split, in the set's order.

    Items have `image` uint8 [height, width, 3], `labels` uint8 [height, width] (index into `classes`, or 255) and
    `name`: the split and the number in it.

    Args:
      root: the directory with dataset_info.json, or a directory above it that holds no other set.
      split: default: the first of `FIRST_SPLITS` that the set has.
      kind: the field that holds the label map, if the set has several.

    Raises:
      FolderError: the directory is not as described; for an item, its label is damaged, has another size than the
        image, or holds values that name no class.
      ImageError: an item's image cannot be read.
      ValueError: the set has no such split or field.
    """

    def __init__(self, root: str | Path, split: str | None = None, kind: str | None = None):
        import tensorflow_datasets as tfds

        self.root = prepared_directory(root)
        try:
            builder: Any = tfds.builder_from_directory(str(self.root))
            features = dict(sorted(builder.info.features.items()))
        except Exception as error:  # tfds raises almost anything at a damaged file
            raise FolderError(f"{self.root} cannot be read: {cut(str(error))}; expected {PREPARED}") from None
        self.name, splits = builder.name, list(builder.info.splits)
        if not splits:
            raise FolderError(f"{self.root} has no split; expected {PREPARED}")
        self.image, self.kind = image_field(features, self.root), label_field(features, self.root, kind)
        named = _names(features[self.kind])
        self.classes = named or read_classes(self.root / CLASSES)
        usual = next((word for word in FIRST_SPLITS if word in splits), None)
        self.split = published_split(split or usual, splits, self.name)
        # tfds would decode images by OpenCV where that is installed. Here Pillow decodes them, so that pixels are the
        # same everywhere.
        encoded = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
        try:
            self._source: Any = builder.as_data_source(
                self.split, decoders={name: tfds.decode.SkipDecoding() for name in encoded}
            )
        except (NotImplementedError, ValueError) as error:
            raise FolderError(f"{self.root} is not {PREPARED}: {str(error).splitlines()[0]}") from None
        self._class_of = listed_ids(len(self.classes), f"{'the set' if named else CLASSES} names")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> Item:
        name = self._name(index)
        place = f"{self.root}, {name}, {self.kind}"
        try:
            record = self._source[index]
        except Exception as error:  # readers of records raise almost anything at a damaged file
            raise FolderError(f"{self.root}, {name} cannot be read: {cut(str(error))}") from None
        labels = self._class_of(label_values(record[self.kind], place), place)
        image = read_fitting(bytes(record[self.image]), labels.shape, place, f"{self.root}, {name}, {self.image}")
        return {"image": image, "labels": labels, "name": name}

    @property
    def names(self) -> list[str]:
        return [self._name(index) for index in range(len(self))]

    def _name(self, index: int) -> str:
        return f"{self.split}-{index:06d}"

    def __repr__(self) -> str:
        return f"PreparedSet({str(self.root)!r}, {self.split!r})"


def prepared_directory(root: str | Path) -> Path:
    """Returns the directory of the prepared set at or below `root`. Raises FolderError if there is none, or several."""
    root = Path(root).expanduser()
    places = [path.parent for depth in range(DEPTH) for path in sorted(root.glob("*/" * depth + INFO))]
    found = [place for place in places if not any(part.startswith(".") for part in place.relative_to(root).parts)]
    if len(found) > 1:
        raise FolderError(f"{root} holds several prepared sets: {', '.join(map(str, found))}; give one of them")
    return found[0] if found else first_of(root, (INFO,), PREPARED).parent


def image_field(features: Mapping[str, Any], root: Path) -> str:
    """Returns the name of the field that holds the image: `image`, or else the only image of three channels.

    Raises FolderError if it is not clear.
    """
    found = [name for name, feature in features.items() if _is_image(feature) and feature.shape[-1] in (3, None)]
    if "image" in features and _is_image(features["image"]):
        return "image"
    if len(found) != 1:
        raise FolderError(
            f"{root} has {len(found)} fields with an image of three channels; expected one: {_described(features)}"
        )
    return found[0]


def label_field(features: Mapping[str, Any], root: Path, kind: str | None) -> str:
    """Returns the name of the field that holds the label map: `kind`, or the only field of one channel.

    Raises FolderError if it is not clear, ValueError if `kind` is no such field.
    """
    found = [name for name, feature in features.items() if name != "image" and _is_label_map(feature)]
    if kind := published_kind(kind, found, f"{root}"):
        return kind
    if len(found) != 1:
        hint = (
            f"choose one of {', '.join(found)} by --data.labels" if found else f"its fields are {_described(features)}"
        )
        raise FolderError(f"{root} has {len(found)} fields with a label map, one whole number a pixel: {hint}")
    return found[0]


def label_values(stored: Any, place: str) -> Integer[np.ndarray, "height width"]:
    """Returns the number that each pixel of a label map holds.

    Args:
      stored: an encoded image, or an array with or without a last axis of length 1.
      place: place of the label, for messages.

    Raises FolderError if it cannot be read.
    """
    if isinstance(stored, bytes):
        return read_values(stored, place)
    values = np.asarray(stored)
    values = values[..., 0] if values.ndim == 3 else values
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise FolderError(f"{place} is {values.dtype} {list(values.shape)}; expected whole numbers [height, width]")
    return values


def _is_image(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Image)


def _is_label_map(feature: Any) -> bool:
    shape = feature.shape if hasattr(feature, "shape") else None
    if not isinstance(shape, tuple):
        return False
    if _is_image(feature):
        return shape[-1] == 1
    whole = np.issubdtype(np.dtype(feature.np_dtype), np.integer)
    return whole and (len(shape) == 2 or (len(shape) == 3 and shape[-1] == 1))


def _names(feature: Any) -> tuple[str, ...]:
    """Returns the class names of a labelled image's feature; none if the names are only numbers."""
    names = tuple(feature.names) if getattr(feature, "num_classes", None) else ()
    return () if names == tuple(map(str, range(len(names)))) else names


def _described(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
