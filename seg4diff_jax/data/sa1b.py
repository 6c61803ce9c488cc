"""Reads SA-1B, or any pictures with masks without names, all in one folder, as Segment Anything's tars unpack:

DIR/sa_1.jpg     a picture
DIR/sa_1.json    {"annotations": [{"segmentation": RLE, "area": 5}, ...]}
captions.json    {"1": "One sentence. Another."}: captions, see `data.image_captions`; the file can be anywhere
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.image_captions import ImageCaptions
from seg4diff_jax.data.labelled import visible
from seg4diff_jax.data.loader import Item
from seg4diff_jax.data.run_lengths import decoded
from seg4diff_jax.data.text_files import Annotations, read_json, unrepeated
from seg4diff_jax.images import read_image

ORIGIN = "SA-1B: pictures (sa_1.jpg) and their masks (sa_1.json) in one folder, as the tars of its page unpack"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class RunLengths:
    """The masks of one picture, as run lengths. A mask is decoded when it is read: a picture can have hundreds."""

    encoded: list[Any]
    size: tuple[int, int]
    place: str

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Bool[np.ndarray, "height width"]:
        """Decodes one mask. Raises FolderError if it is damaged or has another size than the picture."""
        return decoded(self.encoded[index], self.size, f"{self.place}, mask {index}")


class MaskFolder:
    """A random-access source of the pictures of a folder, in alphabetical order.

    Items have `image` uint8 [height, width, 3], `masks` (`RunLengths`, largest area first, by the areas in the file),
    `caption` and `name`.

    Args:
      root: the folder.
      captions: a file of captions; None: all captions are empty.

    Raises:
      FolderError: the folder, a file of masks or the captions are absent, damaged or not as described.
      ImageError: an item's picture cannot be read.
    """

    def __init__(self, root: str | Path, captions: str | Path | None = None):
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise FolderError(f"{self.root}: no such directory; expected {ORIGIN}")
        files = [path for path in visible(self.root.iterdir()) if path.suffix.lower() in SUFFIXES]
        self.files = sorted(files, key=lambda path: path.name)
        if not self.files:
            raise FolderError(f"{self.root} holds no picture; expected {ORIGIN}")
        if absent := [path.name for path in self.files if not path.with_suffix(".json").is_file()]:
            some = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
            raise FolderError(f"{self.root}: no .json with masks beside {some}: expected {ORIGIN}")
        self.captions = ImageCaptions(self.names, captions)

    @property
    def names(self) -> list[str]:
        return [path.stem for path in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Item:
        image, encoded = read_image(self.files[index]), self._annotations(index)
        place = str(self.files[index].with_suffix(".json"))
        masks = RunLengths(encoded, (image.shape[0], image.shape[1]), place)
        name = self.files[index].stem
        return {"image": image, "masks": masks, "caption": self.captions(name), "name": name}

    def _annotations(self, index: int) -> list[Any]:
        """Returns the picture's encoded masks, largest first."""
        file = self.files[index].with_suffix(".json")
        contents = Annotations(read_json(file, ORIGIN), file, ORIGIN)
        masks = contents["annotations"].each()
        if masks and all("id" in each for each in masks):
            unrepeated([each["id"].whole(0, 2**63 - 1) for each in masks], masks)
        found = [(each["area"].number(0), each["segmentation"].value) for each in masks]
        return [encoded for _, encoded in sorted(found, key=lambda pair: -pair[0])]
