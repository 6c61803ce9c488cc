"""SA-1B, or any pictures with masks that have no names, as Segment Anything's tars unpack: all files in one folder.

DIR/sa_1.jpg     a picture
DIR/sa_1.json    {"annotations": [{"segmentation": RLE, "area": 5}, ...]}
captions.json    {"1": "One sentence. Another."}: what each picture shows, by its number; lies anywhere

Pictures of other names than `sa_NUMBER` have the whole name in the number's place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from seg4diff_jax.data.labelled import FolderError
from seg4diff_jax.data.loader import Item
from seg4diff_jax.data.pascal_context import decoded
from seg4diff_jax.images import read_image

ORIGIN = "SA-1B: pictures (sa_1.jpg) and their masks (sa_1.json) in one folder, as the tars of its page unpack"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SENTENCES = 2
"""Of a caption, how many are taken: the published captions are paragraphs, and CLIP reads 77 tokens."""


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
        files = [path for path in self.root.iterdir() if path.suffix.lower() in SUFFIXES]
        self.files = sorted(files, key=lambda path: path.name)
        if not self.files:
            raise FolderError(f"{self.root} holds no picture; expected {ORIGIN}")
        if absent := [path.name for path in self.files if not path.with_suffix(".json").is_file()]:
            some = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
            raise FolderError(f"{self.root}: no .json with masks beside {some}: expected {ORIGIN}")
        self.captions = {} if captions is None else read_captions(captions)
        if self.captions and len(self.uncaptioned()) == len(self):
            key, name = next(iter(self.captions)), self.files[0].stem
            raise FolderError(
                f"{captions} has a caption for none of the {len(self)} pictures of {self.root}: its first key is "
                f"{key!r}, and {name}.jpg would be {self._key(name)!r}"
            )

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
        return {"image": image, "masks": masks, "caption": self._caption(name), "name": name}

    def uncaptioned(self) -> list[str]:
        """Names of the pictures without a caption, whose prompt is empty."""
        return [name for name in self.names if not self._caption(name)]

    def _caption(self, name: str) -> str:
        return first_sentences(self.captions.get(self._key(name), ""))

    @staticmethod
    def _key(name: str) -> str:
        numbered = re.fullmatch(r"sa_(\d+)", name)
        return numbered[1] if numbered else name

    def _annotations(self, index: int) -> list[Any]:
        """The picture's masks, largest first."""
        file = self.files[index].with_suffix(".json")
        try:
            contents = json.loads(file.read_text(encoding="utf-8"))
            found = [(float(each["area"]), each["segmentation"]) for each in contents["annotations"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FolderError(f"{file} cannot be read: {error!r}; expected {ORIGIN}") from None
        return [encoded for _, encoded in sorted(found, key=lambda pair: -pair[0])]


def read_captions(file: str | Path) -> Mapping[str, str]:
    """`{image id: caption}`. Raises FolderError when it is anything else."""
    file = Path(file).expanduser()
    try:
        captions = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{file} cannot be read: {error}; expected a JSON object {{image id: caption}}") from None
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise FolderError(f"{file}: expected a JSON object {{image id: caption}}")
    return captions


def first_sentences(caption: str, count: int = SENTENCES) -> str:
    """The first sentences, up to a full stop at a word's end; a caption without one is taken whole."""
    return " ".join(re.split(r"(?<=\.)\s+", caption.strip())[:count])
