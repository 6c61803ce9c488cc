"""COCO 2017 as it is handed out: COCO-Stuff's maps, panoptic labels, and three sets of classes from either."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.sets import SETS
from tests.reference.label_files import label, picture, text

PERSON, TOOTHBRUSH, BANNER, FURNITURE, WALL_BRICK, TREE, WOOD, TREE_MERGED = 1, 90, 92, 123, 171, 169, 182, 184
"""Category ids."""
IDS = np.array([[PERSON, TOOTHBRUSH, 0], [BANNER, TREE, WOOD]])
"""0 is unlabelled."""


def as_map(ids: np.ndarray) -> np.ndarray:
    return np.where(ids == 0, 255, ids - 1)


def panoptic(root: Path, name: str, ids: np.ndarray, year: str = "val2017") -> dict:
    """Write the label of an image, a segment for each category; returns its entry in the listing."""
    numbers = {category: 3 + 70000 * place for place, category in enumerate(np.unique(ids).tolist()) if category}
    segment = np.vectorize(lambda category: numbers.get(category, 0))(ids)
    pixels = np.stack([segment % 256, segment // 256 % 256, segment // 65536], axis=-1).astype(np.uint8)
    file = root / f"annotations/panoptic_{year}/{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    info = [{"id": number, "category_id": category, "iscrowd": 0} for category, number in numbers.items()]
    return {"image_id": int(name), "file_name": f"{name}.png", "segments_info": info}


def names_at(name: str, labels: np.ndarray) -> list[list[str]]:
    classes = {**dict(enumerate(SETS[name].classes)), 255: "-"}
    return [[classes[value] for value in row] for row in labels.tolist()]


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("000000000285", "000000000139"):
        picture(tmp_path / f"val2017/{name}.jpg")
        label(tmp_path / f"stuffthingmaps/val2017/{name}.png", as_map(IDS))
    return tmp_path


@pytest.fixture
def panoptic_root(tmp_path) -> Path:
    merged = np.where(IDS == TREE, TREE_MERGED, IDS)
    for name in ("000000000285", "000000000139"):
        picture(tmp_path / f"images/val2017/{name}.jpg")
    listing = [panoptic(tmp_path, "000000000139", merged), panoptic(tmp_path, "000000000285", np.full((2, 3), PERSON))]
    text(tmp_path / "annotations/panoptic_val2017.json", {"annotations": listing, "images": [], "categories": []})
    return tmp_path


EXPECTED = {
    "coco-171": [["person", "toothbrush", "-"], ["banner", "tree", "wood"]],
    "coco-object": [["person", "toothbrush", "background"], ["background", "background", "background"]],
    "coco-stuff27": [["person", "indoor", "-"], ["textile", "plant", "solid"]],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_maps_hold_category_ids_less_one(root, name):
    source = SETS[name].open(root)
    assert (source.split, source.kind, source.names) == ("val", "stuffthingmaps", ["000000000139", "000000000285"])
    assert names_at(name, source[0]["labels"]) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_panoptic_labels_number_segments_and_name_merged_stuffs_after_one_of_them(panoptic_root, name):
    source = SETS[name].open(panoptic_root)
    assert source.kind == "panoptic"
    assert names_at(name, source[0]["labels"]) == EXPECTED[name]
    assert (source[1]["labels"] == SETS[name].classes.index("person")).all()


@pytest.mark.parametrize("labels", ["root", "panoptic_root"])
def test_what_nobody_labelled_is_background_of_objects_unless_it_is_to_be_ignored(request, labels):
    objects, place = SETS["coco-object"], request.getfixturevalue(labels)
    for unlabelled, expected in ((None, 0), ("background", 0), ("ignored", 255)):
        label = objects.open(place, unlabelled=unlabelled)[0]["labels"]
        assert label[IDS == 0].tolist() == [expected]
        np.testing.assert_array_equal(label[IDS != 0], objects.open(place)[0]["labels"][IDS != 0])
    with pytest.raises(ValueError, match=r"data\.unlabelled is 'ignored': only coco-object has unlabelled pixels"):
        SETS["coco-171"].open(place, unlabelled="ignored")


def test_classes_keep_the_order_of_ids_and_background_is_before_the_things():
    assert [len(SETS[name].classes) for name in EXPECTED] == [171, 81, 27]
    assert SETS["coco-object"].classes[:3] == ("background", "person", "bicycle")
    assert SETS["coco-171"].classes[:80] == SETS["coco-object"].classes[1:]
    assert SETS["coco-171"].classes[170] == "wood"
    things, stuffs = (SETS["coco-stuff27"].groups[name] for name in ("things", "stuffs"))
    assert (len(things), len(stuffs)) == (12, 15)
    assert SETS["coco-stuff27"].classes[stuffs[0]] == "textile"


def test_the_first_labels_that_are_there_are_read_unless_others_are_asked_for(root):
    entry = panoptic(root, "000000000139", np.full((2, 3), FURNITURE))
    text(root / "annotations/panoptic_val2017.json", {"annotations": [entry]})
    assert SETS["coco-171"].open(root).kind == "stuffthingmaps"
    assert names_at("coco-171", SETS["coco-171"].open(root, None, "panoptic")[0]["labels"])[0][0] == "furniture-other"
    with pytest.raises(ValueError, match=r"data\.labels is 'labelIds': COCO 2017 has stuffthingmaps and panoptic"):
        SETS["coco-171"].open(root, None, "labelIds")


@pytest.mark.parametrize("place", ["stuffthingmaps_trainval2017", "annotations"])
def test_maps_may_lie_where_archive_or_coco_stuff_put_them(root, place):
    (root / place).mkdir()
    (root / "stuffthingmaps/val2017").rename(root / place / "val2017")
    assert names_at("coco-171", SETS["coco-171"].open(root)[0]["labels"]) == EXPECTED["coco-171"]


def test_the_training_split_is_a_directory_of_its_own(root):
    picture(root / "train2017/000000000009.jpg")
    label(root / "stuffthingmaps/train2017/000000000009.png", as_map(np.full((2, 3), WALL_BRICK)))
    assert names_at("coco-171", SETS["coco-171"].open(root, "train")[0]["labels"])[0][0] == "wall-brick"


def test_a_map_that_is_absent_or_holds_what_is_no_category_is_named(root):
    file = root / "stuffthingmaps/val2017/000000000139.png"
    label(file, [[11, 0, 0], [0, 0, 90]])
    (root / "stuffthingmaps/val2017/000000000285.png").unlink()
    source = SETS["coco-object"].open(root)
    with pytest.raises(FolderError, match=r"139\.png: 2 pixels have values from 11 to 90; COCO-Stuff's values are cat"):
        source[0]
    with pytest.raises(FolderError, match=r"285\.png: no such file"):
        source[1]


def test_a_panoptic_label_that_its_listing_does_not_explain_is_named(panoptic_root):
    listing = panoptic_root / "annotations/panoptic_val2017.json"
    entry = panoptic(panoptic_root, "000000000139", IDS)
    entry["segments_info"].pop()
    text(listing, {"annotations": [entry]})
    source = SETS["coco-171"].open(panoptic_root)
    with pytest.raises(FolderError, match=r"139\.png: segment 350003 is not listed in .*panoptic_val2017\.json"):
        source[0]
    with pytest.raises(FolderError, match=r"panoptic_val2017\.json lists no segments of 000000000285\.png"):
        source[1]
    entry["segments_info"].append({"id": 350003, "category_id": 183})
    text(listing, {"annotations": [entry]})
    with pytest.raises(FolderError, match=r"139\.png: 1 pixels have the value 183; those are category ids"):
        SETS["coco-171"].open(panoptic_root)[0]
    label(panoptic_root / "annotations/panoptic_val2017/000000000139.png", IDS)
    with pytest.raises(FolderError, match=r"139\.png is an image of mode L: expected RGB"):
        SETS["coco-171"].open(panoptic_root)[0]
    listing.write_text("{")
    with pytest.raises(
        FolderError, match=r"panoptic_val2017\.json: not JSON: .*; expected COCO's panoptic annotations"
    ):
        SETS["coco-171"].open(panoptic_root)


def test_what_is_not_where_it_should_be_is_named_with_its_origin(root):
    with pytest.raises(
        FolderError, match=r"holds no images/train2017 or train2017; expected COCO 2017 with train2017/"
    ):
        SETS["coco-171"].open(root, "train")
    with pytest.raises(
        FolderError, match=r"holds no annotations/panoptic_val2017 or .*panoptic_annotations_trainval2017"
    ):
        SETS["coco-171"].open(root, "val", "panoptic")
    with pytest.raises(ValueError, match=r"data\.split is 'test': COCO 2017 has val, train"):
        SETS["coco-171"].open(root, "test")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda entry, _: entry["segments_info"].append(entry["segments_info"][0]),
            r"segments_info\[5\]: \d+ a second",
        ),
        (lambda entry, _: entry["segments_info"][0].update(id=1.5), r"segments_info\[0\]\.id: 1\.5 where a whole"),
        (lambda entry, _: entry["segments_info"][0].update(id=10**30), r"segments_info\[0\]\.id: 1000.* where a whole"),
        (lambda entry, _: entry.update(segments_info=None), r"segments_info: a null where a list belongs"),
        (lambda entry, all_: all_["annotations"].append(entry), r"annotations\[1\]: '000000000139' a second time"),
        (lambda _, all_: all_.update(categories=[{"id": 1}, {"id": 1}]), r"categories\[1\]: 1 a second time"),
        (lambda entry, _: entry["segments_info"][0].update(category_id=0), r"category_id: 0 where a whole number of 1"),
        (lambda _, all_: all_.update(categories=[{"id": 0}]), r"categories\[0\]\.id: 0 where a whole number of 1 to"),
        (lambda _, all_: all_.update(annotations={}), r"annotations: a table where a list belongs"),
    ],
)
def test_a_listing_that_says_something_twice_or_is_of_another_kind_is_refused_by_its_place(
    panoptic_root, change, problem
):
    file = panoptic_root / "annotations/panoptic_val2017.json"
    entry = panoptic(panoptic_root, "000000000139", IDS)
    listing = {"annotations": [entry]}
    change(entry, listing)
    text(file, listing)
    with pytest.raises(FolderError, match=rf"panoptic_val2017\.json, .*{problem}"):
        SETS["coco-171"].open(panoptic_root)
