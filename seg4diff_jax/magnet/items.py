"""Makes MAGNET's training items from pictures with masks: a square view, its prompt, and the words of each mask.

The prompt of a labelled picture is the names of the classes in the view, in ascending order of class index, joined by
spaces (Seg4Diff, section 4). Where masks have no names, or captions are given, the prompt is the caption. All items
have equal shapes:

    image         uint8 [size, size, 3]
    clip_l, clip_g [, t5]   token ids
    labels        uint8 [size, size]; class_of_row uint8 [rows], 255 for none; averaging fp32 [rows, 77]
      or
    masks         uint8 [rows, size, size / 8], eight pixels a byte; real bool [rows]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from seg4diff_jax.checked import Checked
from seg4diff_jax.data.crops import Crop, View
from seg4diff_jax.data.folder import LabelledFolder
from seg4diff_jax.data.image_captions import CaptionedPictures, ImageCaptions
from seg4diff_jax.data.loader import DataSource, Item
from seg4diff_jax.data.names import Spelling, spelled
from seg4diff_jax.data.sa1b import MaskFolder
from seg4diff_jax.data.sets import SETS
from seg4diff_jax.data.subset import listed_places
from seg4diff_jax.magnet.matching import largest_first
from seg4diff_jax.miniature.scenes import SceneItems, scene_name
from seg4diff_jax.miniature.world.shapes import CLASSES
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.text import Tokenizers, class_prompts, tokenize

T5_LENGTH = 77
OTHERS = ("folder", "scenes", "sa1b")


@dataclass(frozen=True)
class MaskData(Checked):
    """Which pictures and masks to train on, and the view of each that a training step sees.

    Attributes:
      name: folder (`images/ labels/ classes.txt`), one of the published sets (coco-171, ade20k150, ...), scenes (of
        the synthetic world), or sa1b (pictures with masks that have no names).
      root: directory of the pictures; not for scenes.
      split: split of a published set or of scenes; null: train.
      labels: which labels to use, where a published set has several.
      captions: file of captions, see `data.image_captions`. The captions become the prompts, and masks have no names.
        Null: prompts are empty for sa1b, and the names of the classes for labelled sets.
      list: file with the names of the pictures to use, one a line, see `data.subset`. Null: all pictures.
      names: how prompts spell classes, see `data.names`.
      scenes: number of scenes; for scenes only.
      size: side of the square that the model sees, in pixels; null: the checkpoint's own.
      crop: how the square is cut out, see `data.views`; center and squash give the same view in every epoch.
      flip: mirror half of the views.
      rows: most masks per picture. The largest masks are kept. Classes must also fit into one prompt; a class that is
        left out is not in the prompt.
      least_area: share of the view that a mask without a name must cover to be used.
    """

    name: str = "folder"
    root: str | None = None
    split: str | None = None
    labels: str | None = None
    captions: str | None = None
    list: str | None = None
    names: Spelling = "own"
    scenes: int = 60000
    size: int | None = None
    crop: Crop = "random"
    flip: bool = True
    rows: int = 16
    least_area: float = 0.005

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        found = []
        if self.name not in (*SETS, *OTHERS):
            found.append(f"data.name is {self.name!r}: expected one of {', '.join((*OTHERS, *SETS))}")
        if self.name in SETS and SETS[self.name].single:
            found.append(
                f"data.name is {self.name!r}, whose labels are foreground and background: give one with classes"
            )
        if self.captions is not None and self.name == "scenes":
            found.append(f"data.captions is {self.captions!r}, and scenes have no file of captions: leave it out")
        if self.rows < 1 or self.scenes < 1:
            found.append(f"data.rows is {self.rows} and data.scenes {self.scenes}; expected at least 1 each")
        if not 0 <= self.least_area < 1:
            found.append(f"data.least_area is {self.least_area}; expected a share: 0 <= least_area < 1")
        if self.labels is not None and self.name in OTHERS:
            found.append(f"data.labels is {self.labels!r}, and {self.name} has one kind of labels: leave it out")
        if self.size is not None and (self.size < 8 or self.size % 8):
            found.append(f"data.size is {self.size}; expected a multiple of 8")
        return found

    def misplaced(self) -> list[str]:
        """Returns what is wrong with root, split and labels, which matter only when pictures are read."""
        found = []
        if (self.root is None) != (self.name == "scenes"):
            what = "scenes lie nowhere: leave it out" if self.root else f"give the directory of {self.name}"
            found.append(f"data.root is {self.root!r} and data.name {self.name!r}: {what}")
        if self.name in ("sa1b", "folder") and self.split:
            found.append(f"data.split is {self.split!r}, but {self.name} has no splits: leave it out")
        return found

    @property
    def nameless(self) -> bool:
        """Whether masks have no names, so that no words of the prompt belong to a mask."""
        return self.name == "sa1b" or self.captions is not None


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures, or pictures with masks, and their names.

    Attributes:
      source: items with `image` and `labels`, or with `image`, `masks` and `caption`.
      classes: names of the classes as prompts spell them; None where masks have no names.
      names: name of each picture.
      background: label of pixels that belong to no named class; None: there is no such label.
      uncaptioned: names of the pictures without a caption, whose prompt is empty.
    """

    source: DataSource
    classes: tuple[str, ...] | None
    names: Sequence[str]
    background: int | None = None
    uncaptioned: Sequence[str] = ()


class Subset:
    """Some items of a source."""

    def __init__(self, source: DataSource, indices: Sequence[int]):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Item:
        return self.source[self.indices[index]]


def open_pictures(data: MaskData, size: int) -> Pictures:
    """Opens the pictures that the options name. `size`: side of synthetic scenes, in pixels.

    Raises:
      FolderError: files are missing or not as described, or `data.list` names pictures that do not exist.
      ValueError: the set has no such split, labels or names.
    """
    pictures = _every_picture(data, size)
    if data.list is None:
        return pictures
    return subset(pictures, listed_places(data.list, pictures.names, data.name))


def _every_picture(data: MaskData, size: int) -> Pictures:
    split = data.split or "train"
    if found := data.misplaced():
        raise ValueError("\n".join(found))
    if data.name == "scenes":
        name = scene_name(split)
        source = SceneItems(split, data.scenes, size, ("image", "labels"))
        return Pictures(source, CLASSES, [name(index) for index in range(data.scenes)])
    assert data.root is not None
    if data.name == "sa1b":
        masks = MaskFolder(data.root, data.captions)
        return Pictures(masks, None, masks.names, uncaptioned=masks.captions.absent)
    if data.name == "folder":
        folder = LabelledFolder(data.root)
        pictures = Pictures(folder, spelled(folder.classes, data.names), folder.names)
    else:
        published = SETS[data.name]
        images = published.open(data.root, split, data.labels)
        pictures = Pictures(images, spelled(published.classes, data.names), images.names, published.background)
    return pictures if data.captions is None else _captioned(pictures, data.captions)


def _captioned(pictures: Pictures, file: str) -> Pictures:
    captions = ImageCaptions(pictures.names, file)
    source = CaptionedPictures(pictures.source, pictures.names, captions, pictures.background)
    return Pictures(source, None, pictures.names, uncaptioned=captions.absent)


def subset(pictures: Pictures, indices: Sequence[int]) -> Pictures:
    names = [pictures.names[index] for index in indices]
    uncaptioned = {*pictures.uncaptioned}
    absent = [name for name in names if name in uncaptioned]
    return Pictures(Subset(pictures.source, indices), pictures.classes, names, pictures.background, absent)


# ---- one item -------------------------------------------------------------------------------------------------------


class ViewItems:
    """Turns items of `Pictures` into training items. Can be pickled, for worker processes.

    Args:
      positions: which tokens of the prompt belong to a class. `span`: those of its own words; `release`: every token
        that also occurs in its name. Items then have `name_ids` int32 [rows, tokens] too, padded with -1.
    """

    def __init__(
        self,
        pictures: Pictures,
        data: MaskData,
        size: int,
        tokenizers: Tokenizers,
        positions: Literal["span", "release"] = "span",
    ):
        self.data, self.size, self.tokenizers, self.background = data, size, tokenizers, pictures.background
        self.classes, self.repeats = pictures.classes, data.names == "release"
        self.name_ids: Int[np.ndarray, "classes tokens"] | None = None
        if self.classes is not None:
            class_prompts(tokenizers, self.classes, repeats=self.repeats)  # names that cannot be prompts are refused
            ids = tokenizers.clip_l(list(self.classes), add_special_tokens=False, verbose=False).input_ids
            self.counts = np.array([len(each) for each in ids])
            if positions == "release":
                named = np.full((len(ids), self.counts.max()), -1, np.int32)
                for row, each in zip(named, ids, strict=True):
                    row[: len(each)] = each
                self.name_ids = named

    def __call__(self, item: Item, random: np.random.Generator) -> Item:
        """Returns the training item of a random view, chosen as `data.crop` and `data.flip` say."""
        return self.seen(item, self._view(item, random), bool(self.data.flip and random.random() < 0.5))

    def fixed(self, item: Item) -> Item:
        """Returns the training item of the view that all epochs share, not mirrored; for crops that are not random."""
        return self.seen(item, self._view(item, None))

    def _view(self, item: Item, random: np.random.Generator | None) -> View:
        return View.of(item["image"].shape[:2], self.data.crop, random)

    def seen(self, item: Item, view: View, mirrored: bool = False) -> Item:
        view = view._replace(mirrored=mirrored)
        image = {"image": view.picture(item["image"], self.size)}
        return image | (self._masks(item, view) if self.classes is None else self._labels(item, view))

    def _labels(self, item: Item, view: View) -> Item:
        labels = view.nearest(item["labels"], self.size)
        if self.background is not None:
            labels = np.where(labels == self.background, np.uint8(IGNORED), labels)
        present = self._kept(np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED])
        rows = np.full(self.data.rows, IGNORED, np.uint8)
        rows[: len(present)] = present
        texts, averaging = self._prompt(present)
        item = {"labels": labels, "class_of_row": rows, "averaging": averaging, **texts}
        if self.name_ids is not None:
            named = np.full((self.data.rows, self.name_ids.shape[1]), -1, np.int32)
            named[: len(present)] = self.name_ids[present]
            item["name_ids"] = named
        return item

    def _kept(self, histogram: Int[np.ndarray, " classes"]) -> list[int]:
        """Returns the indices of the largest classes for which there are rows and room in one prompt, ascending."""
        kept: list[int] = []
        room = self.tokenizers.clip_l.model_max_length - 2
        for index in np.argsort(-histogram, kind="stable").tolist():
            if not histogram[index] or len(kept) == self.data.rows:
                break
            if self.counts[index] <= room:
                kept.append(index)
                room -= self.counts[index]
        return sorted(kept)

    def _prompt(self, present: list[int]) -> tuple[Item, Float[np.ndarray, "rows tokens"]]:
        if not present:
            length = self.tokenizers.clip_l.model_max_length
            return prompt_ids(self.tokenizers, ""), np.zeros((self.data.rows, length), np.float32)
        assert self.classes is not None
        prompts = class_prompts(self.tokenizers, [self.classes[index] for index in present], repeats=self.repeats)
        (prompt,) = prompts.prompts
        return prompt_ids(self.tokenizers, prompt), prompts.averaging(self.data.rows)[0]

    def _masks(self, item: Item, view: View) -> Item:
        """Returns the masks that are large enough in the view, largest first.

        `item["masks"]` are sorted by area in the whole picture. Only the first `2 * rows` are decoded, to save time.
        """
        found = item["masks"]
        seen = [view.nearest(found[index], self.size) for index in range(min(len(found), 2 * self.data.rows))]
        areas = np.array([mask.sum() for mask in seen], np.int64)
        order = largest_first(areas, self.size**2, rows=self.data.rows, least=self.data.least_area)
        masks = np.zeros((self.data.rows, self.size, self.size), bool)
        for row, index in enumerate(order):
            masks[row] = seen[index]
        real = np.arange(self.data.rows) < len(order)
        return {"masks": np.packbits(masks, axis=-1), "real": real, **prompt_ids(self.tokenizers, item["caption"])}


def prompt_ids(tokenizers: Tokenizers, prompt: str) -> Item:
    """Returns each text encoder's token ids, int32 [tokens]. Prompts that are too long are cut off."""
    ids = tokenize(tokenizers, [prompt], t5_length=T5_LENGTH)
    return {name: np.asarray(each)[0] for name, each in ids._asdict().items() if each is not None}


def mirrored(item: Item) -> Item:
    """Returns the item of the mirrored view, without its image."""
    turned: dict[str, Any] = {name: value for name, value in item.items() if name != "image"}
    if "labels" in item:
        turned["labels"] = np.ascontiguousarray(item["labels"][:, ::-1])
    if "masks" in item:
        turned["masks"] = mirrored_bits(item["masks"])
    return turned


def mirrored_bits(masks: UInt8[np.ndarray, "rows size bytes"]) -> UInt8[np.ndarray, "rows size bytes"]:
    pixels: Bool[np.ndarray, "rows size size"] = np.unpackbits(masks, axis=-1).astype(bool)
    return np.packbits(pixels[:, :, ::-1], axis=-1)
