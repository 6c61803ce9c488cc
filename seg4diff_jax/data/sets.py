"""The published sets that can be scored, by name. Another set is an entry here and a file that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from seg4diff_jax.data import ade20k, cityscapes, coco, pascal_context, voc
from seg4diff_jax.data.labelled import LabelledImages
from seg4diff_jax.data.names import Background, Unlabelled
from seg4diff_jax.segmentation.metrics import IGNORED

Read = Callable[[str | Path, str | None, str | None, Mapping[int, int]], LabelledImages]
"""Opens a set: where it lies, which split (None: the usual one), which labels (None: any), class of each id."""


@dataclass(frozen=True)
class PublishedSet:
    """A set with its classes. Labels are indices into `classes`, or 255 for what is ignored.

    Attributes:
      read: opens it, see `Read`.
      ids: class of each published id, 255 for those that are ignored.
      layout: what is expected in the directory that is given.
      background: index of the class that stands for all others.
      rule: what becomes of that class unless the user says otherwise.
      groups: classes whose mean IoU is reported apart.
      unlabelled: published id of what nobody labelled, where that is background unless the user says otherwise.
    """

    read: Read
    classes: tuple[str, ...]
    ids: Mapping[int, int]
    layout: str
    background: int | None = None
    rule: Background = "scored"
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    unlabelled: int | None = None

    def open(
        self,
        root: str | Path,
        split: str | None = None,
        kind: str | None = None,
        unlabelled: Unlabelled | None = None,
    ) -> LabelledImages:
        """The set's images, see `LabelledImages`.

        Args:
          root: directory with the set as it is handed out.
          split: default: the one that results are reported on.
          kind: which labels, where the set has several; default: the first that is there.
          unlabelled: what pixels are that nobody labelled; default: background, where the set says so.

        Raises:
          FolderError: something is not where it should be.
          ValueError: the set has no such split or labels, or no pixels that may be one or the other.
        """
        if unlabelled is not None and self.unlabelled is None:
            having = ", ".join(name for name, one in SETS.items() if one.unlabelled is not None)
            raise ValueError(
                f"data.unlabelled is {unlabelled!r}: only {having} has unlabelled pixels that may be either"
            )
        ids = (
            {**self.ids, self.unlabelled: IGNORED}
            if unlabelled == "ignored" and self.unlabelled is not None
            else self.ids
        )
        return self.read(root, split, kind, ids)


SETS: dict[str, PublishedSet] = {
    "voc20": PublishedSet(voc.read_voc, voc.CLASSES, voc.IDS, voc.ORIGIN),
    "voc21": PublishedSet(
        voc.read_voc,
        (*voc.CLASSES, "background"),
        {**voc.IDS, 0: voc.BACKGROUND},
        voc.ORIGIN,
        background=voc.BACKGROUND,
    ),
    "context59": PublishedSet(
        pascal_context.read_context, pascal_context.CLASSES, pascal_context.IDS, pascal_context.ORIGIN
    ),
    "context60": PublishedSet(
        pascal_context.read_context,
        (*pascal_context.CLASSES, "background"),
        pascal_context.IDS_WITH_BACKGROUND,
        pascal_context.ORIGIN,
        background=pascal_context.BACKGROUND,
    ),
    "coco-object": PublishedSet(
        coco.read_coco,
        coco.OBJECT_CLASSES,
        coco.OBJECT_IDS,
        coco.ORIGIN,
        background=coco.BACKGROUND,
        rule="ignored",
        unlabelled=coco.UNLABELLED,
    ),
    "coco-stuff27": PublishedSet(
        coco.read_coco,
        coco.STUFF27_CLASSES,
        coco.STUFF27_IDS,
        coco.ORIGIN,
        groups=coco.STUFF27_GROUPS,
    ),
    "coco-171": PublishedSet(coco.read_coco, coco.CLASSES, coco.IDS, coco.ORIGIN, groups=coco.GROUPS),
    "ade20k150": PublishedSet(ade20k.read_ade20k, ade20k.CLASSES, ade20k.IDS, ade20k.ORIGIN),
    "cityscapes19": PublishedSet(cityscapes.read_cityscapes, cityscapes.CLASSES, cityscapes.IDS, cityscapes.ORIGIN),
    "cityscapes27": PublishedSet(
        partial(cityscapes.read_cityscapes, kinds=cityscapes.KINDS[:1]),
        cityscapes.CLASSES_27,
        cityscapes.IDS_27,
        cityscapes.ORIGIN,
    ),
}
