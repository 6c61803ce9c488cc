"""Cityscapes as it is handed out: ids and train ids, cities, and ids below 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from seg4diff_jax.data.cityscapes import CLASS_IDS
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.sets import SETS
from tests.reference.label_files import label, picture

CITY = SETS["cityscapes19"]
FIRST, SECOND = "frankfurt_000000_000294", "munster_000000_000019"
IDS = [[7, 8, 33], [0, 3, 255], [29, 26, 19]]
"""Road, sidewalk, bicycle; unlabelled, out of the picture, a licence plate (-1); caravan, car, traffic light."""
CLASSES = [[0, 1, 18], [255, 255, 255], [255, 13, 6]]


@pytest.fixture
def root(tmp_path) -> Path:
    for name in (SECOND, FIRST):
        place = f"val/{name.split('_')[0]}/{name}"
        picture(tmp_path / f"leftImg8bit/{place}_leftImg8bit.png", (3, 3))
        label(tmp_path / f"gtFine/{place}_gtFine_labelIds.png", IDS)
    return tmp_path


def test_ids_become_classes_and_all_others_are_ignored_those_below_0_too(root):
    source = CITY.open(root)
    np.testing.assert_array_equal(source[0]["labels"], CLASSES)
    assert (source.split, source.kind) == ("val", "labelIds")
    assert [CITY.classes[index] for index in (0, 1, 18, 13, 6)] == [
        "road",
        "sidewalk",
        "bicycle",
        "car",
        "traffic light",
    ]


def test_ids_below_0_are_ignored_in_labels_of_16_bits(root):
    label(root / f"gtFine/val/frankfurt/{FIRST}_gtFine_labelIds.png", np.array(IDS).astype(np.int16).astype(np.uint16))
    label(root / f"gtFine/val/munster/{SECOND}_gtFine_labelIds.png", [[7, 7, 7], [7, 65535, 7], [7, 7, 7]])
    source = CITY.open(root)
    np.testing.assert_array_equal(source[0]["labels"], CLASSES)
    np.testing.assert_array_equal(source[1]["labels"], [[0, 0, 0], [0, 255, 0], [0, 0, 0]])


def test_train_ids_are_the_classes_and_are_read_when_asked_for_or_alone(root):
    for name in (FIRST, SECOND):
        label(root / f"gtFine/val/{name.split('_')[0]}/{name}_gtFine_labelTrainIds.png", CLASSES)
    np.testing.assert_array_equal(CITY.open(root, None, "labelTrainIds")[0]["labels"], CLASSES)
    assert CITY.open(root).kind == "labelIds"
    for file in root.glob("gtFine/val/*/*labelIds.png"):
        file.unlink()
    source = CITY.open(root)
    assert source.kind == "labelTrainIds"
    np.testing.assert_array_equal(source[1]["labels"], CLASSES)


def test_images_come_in_the_order_of_cities_and_are_named_without_their_ending(root):
    source = CITY.open(root)
    assert [source[index]["name"] for index in range(len(source))] == [FIRST, SECOND]


def test_a_label_that_is_absent_or_beyond_the_ids_is_named(root):
    (root / f"gtFine/val/frankfurt/{FIRST}_gtFine_labelIds.png").unlink()
    label(root / f"gtFine/val/munster/{SECOND}_gtFine_labelIds.png", [[34, 7, 7]] * 3)
    source = CITY.open(root, "val", "labelIds")
    with pytest.raises(
        FolderError, match=r"gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds\.png: no such"
    ):
        source[0]
    with pytest.raises(
        FolderError, match=r"labelIds\.png: 3 pixels have the value 34; Cityscapes has the ids -1 to 33"
    ):
        source[1]


def test_what_is_not_where_it_should_be_is_named_with_its_origin(root):
    with pytest.raises(FolderError, match=r"holds no leftImg8bit/train; expected .*of the Cityscapes page"):
        CITY.open(root, "train")
    with pytest.raises(FolderError, match=r"holds no leftImg8bit/val"):
        CITY.open(root / "gtFine")
    (root / "leftImg8bit/val/lost").symlink_to(root / "another disk")
    with pytest.raises(FolderError, match=r"leftImg8bit/val/lost is a link to nothing"):
        CITY.open(root)


# ---- 27 classes -----------------------------------------------------------------------------------------------------

CITY_27 = SETS["cityscapes27"]
ALL_IDS = [[0, 6, 255, *range(7, 18)], [1, 5, 4, *range(18, 29)], [2, 3, 0, *range(29, 34), *[7] * 6]]


def test_the_27_classes_are_the_ids_7_to_33_in_order(root):
    label(root / f"gtFine/val/frankfurt/{FIRST}_gtFine_labelIds.png", ALL_IDS)
    picture(root / f"leftImg8bit/val/frankfurt/{FIRST}_leftImg8bit.png", np.shape(ALL_IDS))
    ids = np.array(ALL_IDS)
    expected = np.where((ids < 7) | (ids > 33), 255, ids - 7)
    np.testing.assert_array_equal(CITY_27.open(root)[0]["labels"], expected)
    assert len(CITY_27.classes) == 27
    assert [CITY_27.classes[number - 7] for number in (9, 14, 18, 29, 30)] == [
        "parking",
        "guard rail",
        "polegroup",
        "caravan",
        "trailer",
    ]
    assert tuple(CITY_27.classes[number - 7] for number in CLASS_IDS) == CITY.classes


def test_train_ids_do_not_tell_27_classes_apart(root):
    with pytest.raises(ValueError, match=r"data\.labels is 'labelTrainIds': Cityscapes has labelIds"):
        CITY_27.open(root, None, "labelTrainIds")
    for name in (FIRST, SECOND):
        file = root / f"gtFine/val/{name.split('_')[0]}/{name}_gtFine_labelIds.png"
        file.rename(file.with_name(f"{name}_gtFine_labelTrainIds.png"))
    with pytest.raises(FolderError, match=r"gtFine_labelIds\.png: no such file"):
        CITY_27.open(root)[0]
