"""The images of VOC 2012 that hold one class: which they are, and what is foreground in them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.sets import SETS
from tests.reference.label_files import label, picture, text

SET = SETS["voc-single"]
LABELS = {
    "a": [[0, 8, 255], [8, 8, 0]],  # a cat
    "b": [[0, 8, 255], [15, 8, 0]],  # a cat and a person
    "c": [[0, 0, 255], [0, 0, 0]],  # nothing
    "d": [[255, 15, 15], [15, 15, 15]],  # a person everywhere
}


@pytest.fixture
def root(tmp_path) -> Path:
    home = tmp_path / "VOCdevkit/VOC2012"
    text(home / "ImageSets/Segmentation/val.txt", ["d", "b", "c", "a"])
    text(home / "ImageSets/Segmentation/train.txt", ["b", "c"])
    for name, values in LABELS.items():
        picture(home / f"JPEGImages/{name}.jpg")
        label(home / f"SegmentationClass/{name}.png", values, palette=True)
    return tmp_path


def test_images_of_one_class_are_kept_in_the_lists_order_with_its_name(root):
    source = SET.open(root)
    assert (source.names, source.objects) == (["d", "a"], ("person", "cat"))
    assert (source.split, source.kind) == ("val", "SegmentationClass")
    np.testing.assert_array_equal(source[0]["labels"], [[255, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(source[1]["labels"], [[1, 0, 255], [0, 0, 1]])
    assert [source[index]["name"] for index in range(2)] == ["d", "a"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[1]["labels"], source[1]["labels"])


def test_images_are_opened_when_their_turn_comes_and_labels_before(root):
    home = root / "VOCdevkit/VOC2012"
    (home / "JPEGImages/d.jpg").write_bytes(b"")
    assert SET.open(root)[1]["name"] == "a"
    (home / "SegmentationClass/c.png").unlink()
    with pytest.raises(FolderError, match=r"SegmentationClass/c\.png: no such file"):
        SET.open(root)


def test_a_split_without_such_images_is_refused(root):
    with pytest.raises(FolderError, match="no image of train holds exactly one class; expected VOCdevkit"):
        SET.open(root, "train")
