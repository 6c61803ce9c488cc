"""What pictures show, in sentences from a file; and labelled pictures with these for prompts instead of names.

{"1": "One sentence. Another.", ...}                            by the picture's number or name, as Seg4Diff published
{"annotations": [{"image_id": 139, "caption": "..."}, ...]}     COCO's captions_train2017.json: each picture's first
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from seg4diff_jax.data.labelled import FolderError
from seg4diff_jax.data.loader import Item, Source
from seg4diff_jax.segmentation.metrics import IGNORED

SENTENCES = 2
"""Of a caption, how many are taken: the published captions are paragraphs, and CLIP reads 77 tokens."""
EXPECTED = "a JSON object {image id: caption}, or COCO's with a list of annotations"


class ImageCaptions:
    """The captions of some pictures; empty where there is none.

    Args:
      names: of the pictures. `sa_NUMBER` and COCO's twelve digits have their number as key, others their whole name.
      file: None: all are empty.

    Raises:
      FolderError: the file cannot be read, or has a caption for none of the pictures.
    """

    def __init__(self, names: Sequence[str], file: str | Path | None):
        self._captions = {} if file is None else read_captions(file)
        self.absent = [name for name in names if not self(name)]
        """Names of the pictures without a caption."""
        if self._captions and len(self.absent) == len(names):
            raise FolderError(
                f"{file} has a caption for none of the {len(names)} pictures: its first key is "
                f"{next(iter(self._captions))!r}, and that of {names[0]} would be {_key(names[0])!r}"
            )

    def __call__(self, name: str) -> str:
        return first_sentences(self._captions.get(_key(name), ""))


def _key(name: str) -> str:
    numbered = re.fullmatch(r"(?:sa_)?0*(\d+)", name)
    return numbered[1] if numbered else name


def read_captions(file: str | Path) -> Mapping[str, str]:
    """Captions by their pictures' keys. Raises FolderError when the file is anything else."""
    file = Path(file).expanduser()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("annotations"), list):
            each = [(str(annotation["image_id"]), annotation["caption"]) for annotation in found["annotations"]]
            found = dict(reversed(each))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{file} cannot be read: {error!r}; expected {EXPECTED}") from None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise FolderError(f"{file}: expected {EXPECTED}")
    return {_key(key): caption for key, caption in found.items()}


def first_sentences(caption: str, count: int = SENTENCES) -> str:
    """The first sentences, up to a full stop at a word's end; a caption without one is taken whole."""
    return " ".join(re.split(r"(?<=\.)\s+", caption.strip())[:count])


@dataclass(frozen=True)
class ClassMasks:
    """The masks of a label map's classes, made one at a time."""

    labels: UInt8[np.ndarray, "height width"]
    classes: list[int]

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> Bool[np.ndarray, "height width"]:
        return self.labels == self.classes[index]


class CaptionedPictures:
    """Labelled pictures as `sa1b.MaskFolder` has its own: the masks of their classes, largest first, without names.

    Args:
      source: items with `image` and `labels`.
      names: of its items.
      background: label that is no mask; None: every class is one.
    """

    def __init__(self, source: Source, names: Sequence[str], captions: ImageCaptions, background: int | None):
        self.source, self.names, self.captions, self.background = source, names, captions, background

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Item:
        item = self.source[index]
        areas = np.bincount(item["labels"].ravel(), minlength=IGNORED + 1)
        areas[[IGNORED, *([] if self.background is None else [self.background])]] = 0
        largest_first = [number for number in np.argsort(-areas, kind="stable").tolist() if areas[number]]
        masks = ClassMasks(item["labels"], largest_first)
        name = self.names[index]
        return {"image": item["image"], "masks": masks, "caption": self.captions(name), "name": name}
