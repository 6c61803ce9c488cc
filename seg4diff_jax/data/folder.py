"""Reads a folder of labelled images: `images/`, `labels/` and `classes.txt`.

    DIR/images/NAME.jpg    any format that Pillow reads
    DIR/labels/NAME.png    one channel, as large as the image: line number in classes.txt, from 0; 255 is ignored
    DIR/classes.txt        one class name a line

`seg4diff scenes DIR` writes synthetic scenes in this layout.
"""

from __future__ import annotations

from pathlib import Path

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.labelled import IdTable, PngLabels, read_fitting, visible
from seg4diff_jax.data.loader import Item
from seg4diff_jax.data.text_files import read_lines
from seg4diff_jax.segmentation.metrics import IGNORED


class LabelledFolder:
    """A random-access source of the images of a folder, in alphabetical order.

    Items have `image` uint8 [height, width, 3], `labels` uint8 [height, width] (index into `classes`, or 255) and
    `name`, the file's name without its ending.

    Raises:
      FolderError: a part of the folder is absent or not as described; for an item, its label is absent, cannot be read,
        has another size than the image, or holds values that name no class.
      ImageError: an item's image cannot be read.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        for folder in (self.root, self.root / "images", self.root / "labels"):
            if not folder.is_dir():
                raise FolderError(f"{folder}: no such directory; expected a folder with images/, labels/, classes.txt")
        self.classes = read_classes(self.root / "classes.txt")
        files = [path for path in visible((self.root / "images").iterdir()) if not path.is_dir()]
        self.files = sorted(files, key=lambda path: path.name)
        if not self.files:
            raise FolderError(f"{self.root / 'images'} holds no file: expected images")
        by_name: dict[str, Path] = {}
        for path in self.files:
            if path.stem in by_name:
                raise FolderError(f"{by_name[path.stem]} and {path.name} share one name, and so one label; rename one")
            by_name[path.stem] = path
        label_files = [self.root / "labels" / f"{path.stem}.png" for path in self.files]
        self.labels = PngLabels(label_files, listed_ids(len(self.classes), "classes.txt names"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Item:
        labels = self.labels(index)
        image = read_fitting(self.files[index], labels.shape, self.labels.place(index))
        return {"image": image, "labels": labels, "name": self.files[index].stem}

    @property
    def names(self) -> list[str]:
        return [path.stem for path in self.files]

    def __repr__(self) -> str:
        return f"LabelledFolder({str(self.root)!r})"


def listed_ids(classes: int, names: str) -> IdTable:
    """Makes the table of ids that are indices into a list of classes, or 255.

    Args:
      classes: number of classes.
      names: beginning of messages, such as "classes.txt names".

    Raises FolderError if there are more classes than 8-bit labels can hold.
    """
    if classes > IGNORED:
        raise FolderError(f"{names} {classes} classes: expected 1 to {IGNORED}")
    expected = f"{names} {classes} classes, so expected 0 to {classes - 1}, or {IGNORED} for what is ignored"
    return IdTable({**{index: index for index in range(classes)}, IGNORED: IGNORED}, expected)


def read_classes(file: Path) -> tuple[str, ...]:
    """Reads class names, one a line. Raises FolderError if one is blank or repeated, or there are none or too many."""
    names = read_lines(file, "class names, one a line")
    if not 0 < len(names) <= IGNORED:
        raise FolderError(f"{file} names {len(names)} classes: expected 1 to {IGNORED}")
    for index, name in enumerate(names):
        if not name or name in names[:index]:
            problem = f"repeats {name!r}" if name else "is blank"
            raise FolderError(f"{file}, line {index + 1} {problem}: expected a class name of its own on each line")
    return tuple(names)
