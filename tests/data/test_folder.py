"""A folder of labelled images: what it yields, and what it refuses by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.data.folder import FolderError, LabelledFolder, listed_ids
from seg4diff_jax.images import ImageError
from seg4diff_jax.miniature.world.shapes import CLASSES, scene, write_folder

LABELS = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("cat\ntraffic light\nsky\n\n", encoding="utf-8")
    for name, value in (("b.png", 10), ("a.jpg", 200)):
        Image.new("RGB", (3, 2), (value,) * 3).save(tmp_path / "images" / name)
        Image.fromarray(LABELS).save(tmp_path / "labels" / f"{name[0]}.png")
    return tmp_path


def test_items_come_in_alphabetical_order_with_image_labels_and_name(root):
    folder = LabelledFolder(root)
    assert len(folder) == 2
    assert folder.classes == ("cat", "traffic light", "sky")
    assert [folder[index]["name"] for index in range(2)] == ["a", "b"]
    item = folder[1]
    np.testing.assert_array_equal(item["image"], np.full((2, 3, 3), 10, np.uint8))
    np.testing.assert_array_equal(item["labels"], LABELS)
    assert item["labels"].dtype == np.uint8


def test_scenes_are_read_back_as_they_were_written(tmp_path):
    scenes = [scene("test", index, 48) for index in range(3)]
    write_folder(tmp_path, scenes)
    folder = LabelledFolder(tmp_path)
    assert folder.classes == CLASSES
    for index, shown in enumerate(scenes):
        np.testing.assert_array_equal(folder[index]["image"], shown.image)
        np.testing.assert_array_equal(folder[index]["labels"], shown.labels)


@pytest.mark.parametrize("mode", ["P", "I;16"])
def test_labels_with_a_palette_or_of_more_bits_are_the_same_numbers(root, mode):
    if mode == "P":
        image = Image.fromarray(LABELS)
        image.putpalette(list(range(255, -1, -1)) * 3)
    else:
        image = Image.fromarray(LABELS.astype(np.uint16))
    assert image.mode == mode
    image.save(root / "labels" / "a.png")
    np.testing.assert_array_equal(LabelledFolder(root)[0]["labels"], LABELS)


def test_a_rotation_that_exif_asks_for_is_applied_before_sizes_are_compared(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2, 3)).save(root / "images" / "a.jpg", exif=exif)
    assert LabelledFolder(root)[0]["image"].shape == (2, 3, 3)


def spoil_image(root: Path) -> None:
    (root / "images" / "a.jpg").write_bytes(b"no image")


def lose_image(root: Path) -> None:
    (root / "images" / "a.jpg").unlink()
    (root / "images" / "a.jpg").symlink_to(root / "another disk" / "a.jpg")


def lose_label(root: Path) -> None:
    (root / "labels" / "a.png").unlink()
    (root / "labels" / "a.png").symlink_to(root / "another disk" / "a.png")


def remove_label(root: Path) -> None:
    (root / "labels" / "a.png").unlink()


def spoil_label(root: Path) -> None:
    (root / "labels" / "a.png").write_bytes(b"no label")


def paint_outside(root: Path) -> None:
    labels = LABELS.copy()
    labels[0, :2] = 3
    Image.fromarray(labels).save(root / "labels" / "a.png")


def enlarge_label(root: Path) -> None:
    Image.fromarray(np.tile(LABELS, (2, 1))).save(root / "labels" / "a.png")


def colour_label(root: Path) -> None:
    Image.new("RGB", (3, 2)).save(root / "labels" / "a.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil_image, r"images/a\.jpg: cannot be read as an image"),
        (lose_image, r"images/a\.jpg: a link to nothing"),
        (lose_label, r"labels/a\.png: a link to nothing"),
        (remove_label, r"labels/a\.png: no such file"),
        (spoil_label, r"labels/a\.png: cannot be read as an image"),
        (paint_outside, r"labels/a\.png: 2 pixels have the value 3; classes\.txt names 3 classes, so expected 0 to 2"),
        (enlarge_label, r"labels/a\.png is 4 x 3 pixels and its image 2 x 3"),
        (colour_label, r"labels/a\.png is an image of mode RGB"),
    ],
)
def test_an_item_that_cannot_be_used_is_refused_by_its_files_name_and_the_others_are_not(root, damage, message):
    damage(root)
    folder = LabelledFolder(root)
    with pytest.raises((FolderError, ImageError), match=message):
        folder[0]
    assert folder[1]["name"] == "b"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", "names 0 classes"),
        ("cat\n\nsky\n", r"classes\.txt, line 2 is blank"),
        ("cat\nsky\ncat\n", r"classes\.txt, line 3 repeats 'cat'"),
        ("".join(f"class {index}\n" for index in range(256)), "names 256 classes"),
        (None, r"classes\.txt: no such file; expected class names"),
    ],
)
def test_a_list_of_classes_that_names_none_or_two_alike_is_refused(root, contents, message):
    (root / "classes.txt").unlink()
    if contents is not None:
        (root / "classes.txt").write_text(contents)
    with pytest.raises(FolderError, match=message):
        LabelledFolder(root)


def test_a_folder_without_its_parts_is_refused(root, tmp_path):
    with pytest.raises(FolderError, match=r"absent: no such directory; expected a folder with images/, labels/"):
        LabelledFolder(tmp_path / "absent")
    (root / "images" / "b.jpg").write_bytes((root / "images" / "a.jpg").read_bytes())
    with pytest.raises(FolderError, match=r"b\.jpg and b\.png share one name"):
        LabelledFolder(root)
    for file in (root / "images").iterdir():
        file.unlink()
    with pytest.raises(FolderError, match="images holds no file"):
        LabelledFolder(root)


def test_more_classes_than_a_label_of_8_bits_can_tell_apart_are_refused():
    assert listed_ids(255, "the set names")
    with pytest.raises(FolderError, match="the set names 256 classes: expected 1 to 255"):
        listed_ids(256, "the set names")
