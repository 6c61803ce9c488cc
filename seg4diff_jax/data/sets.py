"""The published sets that can be scored, by name. To add a set, add an entry here and a module that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from seg4diff_jax.data import (
    ade20k,
    cityscapes,
    coco,
    imagenet_segmentation,
    pascal_context,
    single_objects,
    voc,
    voc_single,
)
from seg4diff_jax.data.imagenet_segmentation import MatlabImages
from seg4diff_jax.data.labelled import LabelledImages
from seg4diff_jax.data.names import Background, Unlabelled
from seg4diff_jax.segmentation.metrics import IGNORED

PublishedImages = LabelledImages | MatlabImages
Read = Callable[[str | Path, str | None, str | None, Mapping[int, int]], PublishedImages]
"""A function that opens a set. Its arguments are the directory, the split (None: the usual one), the kind of labels
(None: any) and the class of each id."""


@dataclass(frozen=True)
class PublishedSet:
    """A published set with its classes. Labels are indices into `classes`, or 255 for ignored pixels.

    Attributes:
      read: opens the set, see `Read`.
      classes: names of the classes, in the order of the labels.
      ids: class of each published id; 255 for ignored ids.
      layout: what the given directory is expected to hold.
      background: index of the class that stands for all others; None: there is none.
      rule: default rule for that class.
      groups: groups of classes whose mean IoU is reported separately.
      unlabelled: published id of unlabelled pixels, if these are background by default and may also be ignored.
      single: each image has one object. Its name is that of its class, the source's `objects` have it, and labels tell
        foreground from background alone.
    """

    read: Read
    classes: tuple[str, ...]
    ids: Mapping[int, int]
    layout: str
    background: int | None = None
    rule: Background = "scored"
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    unlabelled: int | None = None
    single: bool = False

    def open(
        self,
        root: str | Path,
        split: str | None = None,
        kind: str | None = None,
        unlabelled: Unlabelled | None = None,
    ) -> PublishedImages:
        """Opens the set, and returns its images.

        Args:
          root: directory with the set as published.
          split: default: the split that results are reported on.
          kind: kind of labels, for a set with several; default: the first that is there.
          unlabelled: rule for pixels that nobody labelled; default: background, in sets with `unlabelled`.

        Raises:
          FolderError: a file or a directory is missing.
          ValueError: the set has no such split or labels, or `unlabelled` is given for a set without such a rule.
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
    "imagenet-segmentation": PublishedSet(
        imagenet_segmentation.read_imagenet,
        single_objects.CLASSES,
        imagenet_segmentation.IDS,
        imagenet_segmentation.ORIGIN,
        background=single_objects.BACKGROUND,
        single=True,
    ),
    "voc-single": PublishedSet(
        voc_single.read_single,
        single_objects.CLASSES,
        voc_single.IDS,
        voc.ORIGIN,
        background=single_objects.BACKGROUND,
        single=True,
    ),
}
