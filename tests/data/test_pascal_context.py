"""PASCAL Context straight from trainval_merged.json: run lengths down the columns, 459 ids to 59 classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as run_lengths

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.sets import SETS
from tests.reference.label_files import picture, text

CONTEXT = SETS["context59"]
SKY, TABLE, OTHER = 360, 397, 1
"""Published ids: two of the 59, and one of the rest."""


def encoded(mask: Any) -> dict:
    found = run_lengths.encode(np.asfortranarray(mask, np.uint8))
    return {"size": found["size"], "counts": found["counts"].decode()}


def annotations() -> dict:
    """Two images of the validation split, listed out of order, and one of the training split."""
    images = [
        {"image_id": 2008000009, "file_name": "2008_000009.jpg", "phase": "val", "height": 2, "width": 3},
        {"image_id": 2008000002, "file_name": "2008_000002.jpg", "phase": "val", "height": 2, "width": 3},
        {"image_id": 2008000003, "file_name": "2008_000003.jpg", "phase": "train", "height": 2, "width": 3},
    ]
    masks = [
        # Three runs, counted down the columns: two pixels not in the mask, three in it, one not in it.
        (2008000002, SKY, {"size": [2, 3], "counts": [2, 3, 1]}),
        (2008000002, TABLE, encoded([[0, 0, 0], [0, 0, 1]])),
        (2008000002, OTHER, encoded([[1, 0, 0], [0, 0, 0]])),
        (2008000009, SKY, encoded(np.ones((2, 3)))),
        (2008000009, TABLE, encoded([[0, 0, 1], [0, 0, 1]])),
        (2008000003, 458, encoded(np.ones((2, 3)))),
    ]
    listing = [
        {"id": number, "image_id": image, "category_id": category, "segmentation": mask, "area": 1.0, "parts": []}
        for number, (image, category, mask) in enumerate(masks)
    ]
    return {"info": {}, "images": images, "annos_segmentation": listing, "annos_boundary": [{"image_id": 1}]}


@pytest.fixture
def root(tmp_path) -> Path:
    home = tmp_path / "VOCdevkit" / "VOC2010"
    for number in (2, 3, 9):
        picture(home / f"JPEGImages/2008_00000{number}.jpg")
    text(home / "trainval_merged.json", annotations())
    return tmp_path


def rewrite(root: Path, change: Any) -> None:
    contents = annotations()
    change(contents)
    text(root / "VOCdevkit/VOC2010/trainval_merged.json", contents)


def test_run_lengths_go_down_the_columns_and_ids_become_classes(root):
    sky, table = CONTEXT.classes.index("sky"), CONTEXT.classes.index("diningtable")
    item = CONTEXT.open(root)[0]
    assert item["name"] == "2008_000002"
    np.testing.assert_array_equal(item["labels"], [[255, sky, sky], [255, sky, table]])
    assert item["image"].shape == (2, 3, 3)


def test_what_is_none_of_the_59_is_ignored_or_the_60th(root):
    np.testing.assert_array_equal(CONTEXT.open(root)[0]["labels"] == 255, [[1, 0, 0], [1, 0, 0]])
    sixty = SETS["context60"]
    assert (len(CONTEXT.classes), len(sixty.classes), sixty.classes[59]) == (59, 60, "background")
    np.testing.assert_array_equal(sixty.open(root)[0]["labels"] == 59, [[1, 0, 0], [1, 0, 0]])


def test_a_later_mask_lies_on_an_earlier_one(root):
    labels = CONTEXT.open(root)[1]["labels"]
    names = np.array(CONTEXT.classes)[labels]
    np.testing.assert_array_equal(names, [["sky", "sky", "diningtable"]] * 2)


def test_splits_are_the_files_own_in_alphabetical_order(root):
    assert CONTEXT.open(root).names == ["2008_000002", "2008_000009"]
    training = CONTEXT.open(root / "VOCdevkit", "train")
    assert training.names == ["2008_000003"]
    assert CONTEXT.classes[training[0]["labels"][0, 0]] == "wood"
    with pytest.raises(ValueError, match="PASCAL Context has val, train"):
        CONTEXT.open(root, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda all_: all_["annos_segmentation"][0].update(category_id=460),
            r"000002: 3 pixels have the value 460; .*459",
        ),
        (lambda all_: all_["annos_segmentation"][1]["segmentation"].update(size=[3, 2]), r"a mask is of size \(3, 2\)"),
        (
            lambda all_: all_["annos_segmentation"][0]["segmentation"].update(counts=[2, 3]),
            "a mask is damaged: counts mak",
        ),
        (
            lambda all_: all_["annos_segmentation"][0]["segmentation"].pop("counts"),
            "a mask is damaged: it has no 'counts'",
        ),
        (
            lambda all_: all_["images"][1].update(height=4),
            r"a mask is of size \(2, 3\); expected the image's, \(4, 3\)",
        ),
    ],
)
def test_a_mask_that_cannot_be_used_is_named_by_file_and_image(root, change, message):
    rewrite(root, change)
    source = CONTEXT.open(root)
    with pytest.raises(FolderError, match=r"trainval_merged\.json, 2008_000002: .*" + message.removeprefix("000002: ")):
        source[0]
    assert source[1]["name"] == "2008_000009"


def test_a_phase_that_is_no_split_is_refused(root):
    rewrite(root, lambda contents: contents["images"][1].update(phase="vall"))
    with pytest.raises(FolderError, match=r"_merged\.json, images\[1\]\.phase: 'vall' where one of val, train, test"):
        CONTEXT.open(root)


def test_a_picture_of_another_size_than_its_masks_is_refused(root):
    picture(root / "VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg", (4, 4))
    with pytest.raises(FolderError, match=r"2008_000002 is 2 x 3 pixels and its image 4 x 4 \(.*2008_000002\.jpg\)"):
        CONTEXT.open(root)[0]


def test_what_is_not_where_it_should_be_or_not_as_described_is_named_with_its_origin(root):
    file = root / "VOCdevkit/VOC2010/trainval_merged.json"
    file.write_text(json.dumps(annotations())[:-20])
    with pytest.raises(FolderError, match=r"trainval_merged\.json: not JSON: .*VOCdevkit/VOC2010"):
        CONTEXT.open(root)
    rewrite(root, lambda all_: all_.pop("annos_segmentation"))
    with pytest.raises(FolderError, match=r"trainval_merged\.json: no 'annos_segmentation'; expected"):
        CONTEXT.open(root)
    rewrite(root, lambda all_: all_.update(images=[]))
    with pytest.raises(FolderError, match="names no image of the split val"):
        CONTEXT.open(root)
    file.unlink()
    with pytest.raises(
        FolderError, match=r"holds no trainval_merged\.json or VOC2010/trainval_merged\.json .*in Detail"
    ):
        CONTEXT.open(root)
