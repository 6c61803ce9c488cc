"""SA-1B, or any pictures with masks that have no names, as Segment Anything's tars unpack: all files in one folder.

DIR/sa_1.jpg     a picture
DIR/sa_1.json    {"annotations": [{"segmentation": RLE, "area": 5}, ...]}
captions.json    {"1": "One sentence. Another."}: what each picture shows, see `data.image_captions`; lies anywhere
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from seg4diff_jax.data.image_captions import ImageCaptions
from seg4diff_jax.data.labelled import FolderError, visible
from seg4diff_jax.data.loader import Item
from seg4diff_jax.data.run_lengths import decoded
from seg4diff_jax.data.text_files import Annotations, read_json, unrepeated
from seg4diff_jax.images import read_image

ORIGIN = "SA-1B: pictures (sa_1.jpg) and their masks (sa_1.json) in one folder, as the tars of its page unpack"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class RunLengths:
    """The masks of one picture as they are stored; decoded one at a time, for a picture can have hundreds."""

    encoded: list[Any]
    size: tuple[int, int]
    place: str

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Bool[np.ndarray, "height width"]:
        """Raises FolderError when it is damaged or not of the picture's size."""
        return decoded(self.encoded[index], self.size, f"{self.place}, mask {index}")


class MaskFolder:
    """The pictures of a folder as a random-access source, in alphabetical order.

    Items have `image` uint8 [height, width, 3], `masks` (`RunLengths`, largest first by what the file says), `caption`
    and `name`.

    Args:
      root: the folder.
      captions: a file of captions; None: all are empty.

    Raises:
      FolderError: a part is absent, damaged or not as described; for an item also when its masks are.
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
        """The picture's masks, largest first."""
        file = self.files[index].with_suffix(".json")
        contents = Annotations(read_json(file, ORIGIN), file, ORIGIN)
        masks = contents["annotations"].each()
        if masks and all("id" in each for each in masks):
            unrepeated([each["id"].whole(0, 2**63 - 1) for each in masks], masks)
        found = [(each["area"].number(0), each["segmentation"].value) for each in masks]
        return [encoded for _, encoded in sorted(found, key=lambda pair: -pair[0])]
