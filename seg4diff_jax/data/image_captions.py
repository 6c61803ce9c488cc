"""Reads captions of pictures from a file, and pairs labelled pictures with captions as prompts. Two forms are read:

{"1": "One sentence. Another.", ...}                            by the picture's number or name, as Seg4Diff published
{"annotations": [{"image_id": 139, "caption": "..."}, ...]}     COCO's captions_train2017.json: each picture's first
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.loader import DataSource, Item
from seg4diff_jax.data.text_files import Annotations, read_json, unrepeated
from seg4diff_jax.quoting import cut, quoted
from seg4diff_jax.segmentation.metrics import IGNORED

SENTENCES = 2
"""Sentences that are taken of a caption. The published captions are paragraphs, and CLIP reads 77 tokens."""
EXPECTED = "a JSON object {image id: caption}, or COCO's with a list of annotations"


class ImageCaptions:
    """The captions of pictures by the pictures' names. A picture without one has an empty caption.

    Args:
      names: names of the pictures. The key of `sa_NUMBER`, and of digits alone such as COCO's, is the number; the key
        of any other name is the whole name.
      file: file of captions; None: all captions are empty.

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
                f"{quoted(next(iter(self._captions)))}, and that of {names[0]} would be {_key(names[0])!r}"
            )

    def __call__(self, name: str) -> str:
        return first_sentences(self._captions.get(_key(name), ""))


def _key(name: str) -> str:
    numbered = re.fullmatch(r"(?:sa_)?0*(\d+)", name)
    return numbered[1] if numbered else name


def read_captions(file: str | Path) -> Mapping[str, str]:
    """Reads captions, by the keys of their pictures. Raises FolderError for a file of another form."""
    found = Annotations(read_json(file, EXPECTED), file, EXPECTED)
    if "annotations" in found and isinstance(found["annotations"].value, list):
        each = found["annotations"].each()
        if all("id" in one for one in each):
            unrepeated([one["id"].label() for one in each], each)
        pairs = [(_image_key(one["image_id"]), one["caption"].text()) for one in each]
        return dict(reversed(pairs))
    if not isinstance(found.value, dict):
        raise found.refuse("a list or a single value")
    captions: dict[str, str] = {}
    for name in found.value:
        if (key := _key(name)) in captions:
            raise found[name].refuse(f"a second caption of the picture {cut(key)}")
        captions[key] = found[name].text()
    return captions


def _image_key(number: Annotations) -> str:
    return _key(number.value if isinstance(number.value, str) else str(number.whole(0, 2**63 - 1)))


def first_sentences(caption: str, count: int = SENTENCES) -> str:
    """Returns the first sentences. A sentence ends with a full stop before a space; without any, all is returned."""
    return " ".join(re.split(r"(?<=\.)\s+", caption.strip())[:count])


@dataclass(frozen=True)
class ClassMasks:
    """The masks of the classes of a label map. Each mask is made when it is read."""

    labels: UInt8[np.ndarray, "height width"]
    classes: list[int]

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> Bool[np.ndarray, "height width"]:
        return self.labels == self.classes[index]


class CaptionedPictures:
    """A source of labelled pictures with items as in `sa1b.MaskFolder`: masks without names, largest first.

    Each class of a picture's labels is one mask.

    Args:
      source: a source of items with `image` and `labels`.
      names: names of its items.
      captions: the captions of the pictures.
      background: label that is not a mask; None: every class is a mask.
    """

    def __init__(self, source: DataSource, names: Sequence[str], captions: ImageCaptions, background: int | None):
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
