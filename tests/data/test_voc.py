"""VOC 2012 as it is handed out: palettes, borders, lists, both folders of labels, and awkward pictures."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.sets import SETS
from seg4diff_jax.images import ImageError
from tests.reference.label_files import GRAY, TURNED, label, picture, text

FIRST, SECOND = "2007_000033", "2007_000042"
VALUES = np.array([[0, 1, 255], [20, 11, 0]])
VOC20 = [[255, 0, 255], [19, 10, 255]]
VOC21 = [[20, 0, 255], [19, 10, 20]]


@pytest.fixture
def root(tmp_path) -> Path:
    """A directory that holds VOCdevkit, as the archive unpacks."""
    home = tmp_path / "VOCdevkit" / "VOC2012"
    text(home / "ImageSets/Segmentation/val.txt", [SECOND, FIRST])
    text(home / "ImageSets/Segmentation/train.txt", ["2007_000032"])
    for name in (FIRST, SECOND, "2007_000032"):
        picture(home / f"JPEGImages/{name}.jpg")
        label(home / f"SegmentationClass/{name}.png", VALUES, palette=True)
    return tmp_path


def home_of(root: Path) -> Path:
    return root / "VOCdevkit" / "VOC2012"


@pytest.mark.parametrize(("name", "expected"), [("voc20", VOC20), ("voc21", VOC21)])
def test_palette_labels_are_numbers_and_background_is_a_class_of_voc21_alone(root, name, expected):
    item = SETS[name].open(root)[0]
    np.testing.assert_array_equal(item["labels"], np.array(expected, np.uint8))
    assert item["labels"].dtype == np.uint8
    np.testing.assert_array_equal(item["image"], np.full((2, 3, 3), GRAY, np.uint8))
    assert len(SETS[name].classes) == {"voc20": 20, "voc21": 21}[name]
    assert (SETS[name].classes[10], SETS[name].classes[19]) == ("diningtable", "tvmonitor")
    assert SETS["voc21"].classes[20] == "background"


def test_images_are_those_that_the_splits_list_names_in_its_order(root):
    source = SETS["voc20"].open(root)
    assert (source.split, source.kind) == ("val", "SegmentationClass")
    assert [source[index]["name"] for index in range(len(source))] == [SECOND, FIRST]
    assert SETS["voc20"].open(root, "train").names == ["2007_000032"]
    assert SETS["voc20"].open(root, "validation").split == "val"


def test_the_directory_given_may_be_the_set_itself_or_one_above_it(root):
    for place in (root, root / "VOCdevkit", home_of(root)):
        assert SETS["voc20"].open(place)[1]["name"] == FIRST


def test_labels_that_came_later_are_read_when_asked_for_and_for_lists_named_after_them(root):
    label(home_of(root) / f"SegmentationClassAug/{FIRST}.png", np.full((2, 3), 5))
    lists = home_of(root) / "ImageSets/Segmentation"
    text(lists / "train_aug.txt", [f"/JPEGImages/{FIRST}.jpg /SegmentationClassAug/{FIRST}.png", ""])
    asked = SETS["voc20"].open(root, "val", "SegmentationClassAug")
    assert asked.kind == "SegmentationClassAug"
    assert (asked[1]["labels"] == 4).all()
    listed = SETS["voc20"].open(root, "train_aug")
    assert (listed.kind, listed.names) == ("SegmentationClassAug", [FIRST])
    assert SETS["voc20"].open(root).kind == "SegmentationClass"


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_pictures_are_read_as_rgb(root, mode):
    picture(home_of(root) / f"JPEGImages/{FIRST}.jpg", mode=mode)
    image = SETS["voc20"].open(root)[1]["image"]
    assert image.shape == (2, 3, 3)
    assert np.abs(image.astype(int) - GRAY).max() <= 2


def test_a_picture_is_turned_as_exif_says_unless_its_label_fits_the_stored_pixels_alone(root):
    file = home_of(root) / f"JPEGImages/{FIRST}.jpg"
    source = SETS["voc20"].open(root)
    picture(file, (3, 2), orientation=TURNED)
    assert source[1]["image"].shape == (2, 3, 3)
    picture(file, (2, 3), orientation=TURNED)
    assert source[1]["image"].shape == (2, 3, 3)


def test_files_are_opened_one_by_one_and_workers_get_copies(root):
    source = SETS["voc20"].open(root)
    (home_of(root) / f"JPEGImages/{FIRST}.jpg").write_bytes(b"")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[0]["labels"], source[0]["labels"])


@pytest.mark.parametrize(
    ("folder", "write", "message"),
    [
        ("JPEGImages", lambda file: file.write_bytes(b"no image"), r"000033\.jpg: cannot be read as an image"),
        ("JPEGImages", lambda file: file.unlink(), r"JPEGImages/2007_000033\.jpg: no such file"),
        (
            "JPEGImages",
            lambda file: picture(file, (4, 3)),
            r"SegmentationClass/2007_000033\.png is 2 x 3 pixels and .*4",
        ),
        ("SegmentationClass", lambda file: file.unlink(), r"SegmentationClass/2007_000033\.png: no such file"),
        ("SegmentationClass", lambda file: file.write_bytes(b"no"), r"000033\.png: cannot be read as an image"),
        (
            "SegmentationClass",
            lambda file: label(file, [[0, 21, 21], [1, 1, 1]]),
            r"SegmentationClass/2007_000033\.png: 2 pixels have the value 21; VOC's 20 classes are 1 to 20",
        ),
        ("SegmentationClass", lambda file: picture(file), r"000033\.png is an image of mode RGB: expected one channel"),
    ],
)
def test_an_item_that_cannot_be_used_is_refused_by_name_and_the_others_are_not(root, folder, write, message):
    (file,) = (home_of(root) / folder).glob(f"{FIRST}.*")
    write(file)
    source = SETS["voc20"].open(root)
    with pytest.raises((FolderError, ImageError), match=message):
        source[1]
    assert source[0]["name"] == SECOND


def test_what_is_not_where_it_should_be_is_named_with_its_origin(root, tmp_path):
    with pytest.raises(FolderError, match=r"absent: no such directory; expected VOCdevkit/VOC2012 .*VOC 2012 page"):
        SETS["voc20"].open(tmp_path / "absent")
    with pytest.raises(FolderError, match=r"ImageSets/Segmentation or VOC2012/ImageSets/Segmentation.*trainval_11-May"):
        SETS["voc20"].open(root / "VOCdevkit/VOC2012/JPEGImages")
    with pytest.raises(FolderError, match=r"Segmentation/test\.txt: no such file; the lists there are: train, val"):
        SETS["voc20"].open(root, "test")
    with pytest.raises(FolderError, match=r"VOC2012 holds no SegmentationClassAug; expected"):
        SETS["voc20"].open(root, "val", "SegmentationClassAug")
    with pytest.raises(ValueError, match=r"data\.labels is 'panoptic': VOC2012 has SegmentationClass and Segment"):
        SETS["voc20"].open(root, "val", "panoptic")
    text(home_of(root) / "ImageSets/Segmentation/val.txt", [])
    with pytest.raises(FolderError, match=r"val\.txt is empty"):
        SETS["voc20"].open(root)
