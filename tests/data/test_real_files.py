"""Files of published sets, where this machine has some, are read as the sets' own definitions and tools read them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from seg4diff_jax.data.coco import PanopticLabels, read_coco
from seg4diff_jax.data.coco_categories import CATEGORIES, MERGED
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.image_captions import read_captions
from seg4diff_jax.data.labelled import LabelledImages
from seg4diff_jax.data.run_lengths import decoded, lengths_of
from seg4diff_jax.data.sets import SETS
from seg4diff_jax.images import read_image
from tests.reference.label_files import picture

REAL = Path(__file__).parents[2].parent / "shared" / "real"
pytestmark = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"{REAL}: no such directory; expected files of published sets"
)
NAME_OF = {category.id: category.name for category in CATEGORIES} | MERGED


def with_images(root: Path, labels: Path, year: str) -> Path:
    """The labels' layout with an image of one gray for each."""
    for file in sorted(labels.glob("*.png")):
        with Image.open(file) as opened:
            picture(root / year / f"{file.stem}.jpg", opened.size[::-1])
    for part in (REAL / "coco", REAL / "coco_panoptic"):
        if labels.is_relative_to(part):
            for entry in part.iterdir():
                (root / entry.name).symlink_to(entry)
    return root


def counted(source: LabelledImages, classes: tuple[str, ...]) -> list[Counter[str]]:
    named = {**dict(enumerate(classes)), 255: "-"}
    labels = [source[index]["labels"] for index in range(len(source))]
    return [
        Counter({named[value]: int((each == value).sum()) for value in np.unique(each).tolist()}) for each in labels
    ]


def as_objects(categories: Counter[int]) -> Counter[str]:
    """COCO's categories as GroupViT and others convert them: what is no thing is background, unlabelled pixels too."""
    found: Counter[str] = Counter()
    for category, pixels in categories.items():
        found[NAME_OF[category] if 0 < category <= 90 else "background"] += pixels
    return found


@pytest.mark.parametrize("split", ["val", "train"])
def test_stuffthingmaps_hold_category_ids_less_one(tmp_path, split):
    maps = REAL / f"coco/stuffthingmaps/{split}2017"
    root = with_images(tmp_path, maps, f"{split}2017")
    categories = []
    for file in sorted(maps.glob("*.png")):
        values, numbers = np.unique(np.asarray(Image.open(file)), return_counts=True)
        categories.append(
            Counter(
                {(value + 1) % 256: number for value, number in zip(values.tolist(), numbers.tolist(), strict=True)}
            )
        )
    objects, every = SETS["coco-object"], SETS["coco-171"]
    assert counted(objects.open(root, split), objects.classes) == [as_objects(each) for each in categories]
    named = [Counter({NAME_OF.get(category, "-"): number for category, number in each.items()}) for each in categories]
    assert counted(every.open(root, split), every.classes) == named
    ignored = counted(objects.open(root, split, unlabelled="ignored"), objects.classes)
    assert [each["-"] for each in ignored] == [each[0] for each in categories]
    assert any(each[0] for each in categories)


def test_panoptic_maps_hold_the_areas_that_their_own_listing_says(tmp_path):
    folder = REAL / "coco_panoptic/annotations/panoptic_val2017"
    root = with_images(tmp_path, folder, "val2017")
    listing = json.loads(folder.with_suffix(".json").read_text())
    expected = []
    for entry in sorted(listing["annotations"], key=lambda entry: entry["file_name"]):
        pixels = np.asarray(Image.open(folder / entry["file_name"])).astype(np.int64)
        numbers = pixels[..., 0] + 256 * pixels[..., 1] + 256**2 * pixels[..., 2]
        found: Counter[int] = Counter({0: int((numbers == 0).sum())})
        for segment in entry["segments_info"]:
            assert (numbers == segment["id"]).sum() == segment["area"]
            found[segment["category_id"]] += segment["area"]
        expected.append(+found)
    objects, every = SETS["coco-object"], SETS["coco-171"]
    source = objects.open(root)
    assert isinstance(source.labels, PanopticLabels)
    assert counted(source, objects.classes) == [as_objects(each) for each in expected]
    as_names: list[Counter[str]] = []
    for each in expected:
        as_names.append(Counter())
        for category, number in each.items():
            as_names[-1][NAME_OF.get(category, "-")] += number
    assert counted(read_coco(root, "val", "panoptic", every.ids), every.classes) == as_names


def masks() -> list[tuple[dict, tuple[int, int]]]:
    if not REAL.is_dir():
        return []
    crowds = json.loads((REAL / "rle/coco_crowd_uncompressed.json").read_text())
    stuffs = json.loads((REAL / "rle/stuff_examples.json").read_text())["annotations"]
    found = [each["segmentation"] for each in (*crowds, *stuffs) if isinstance(each["segmentation"], dict)]
    return [(each, (each["size"][0], each["size"][1])) for each in found]


@pytest.mark.parametrize(("mask", "size"), masks())
def test_run_lengths_are_what_cocos_own_tools_make_of_them(mask, size):
    text = coco.frPyObjects(mask, *size) if isinstance(mask["counts"], list) else mask
    expected = coco.decode(text)
    np.testing.assert_array_equal(decoded(mask, size, "a place"), expected)
    np.testing.assert_array_equal(decoded(text, size, "a place"), expected)
    assert lengths_of(text["counts"]).tolist() == lengths_of(mask["counts"]).tolist()
    shorter = {"size": list(size), "counts": lengths_of(mask["counts"]).tolist()[:-1]}
    with pytest.raises(FolderError, match="a mask is damaged: counts make"):
        decoded(shorter, size, "a place")


def test_captions_are_each_pictures_first():
    annotations = json.loads((REAL / "captions_val2017_12.json").read_text())["annotations"]
    found = read_captions(REAL / "captions_val2017_12.json")
    assert set(found) == {str(each["image_id"]) for each in annotations}
    for key, caption in found.items():
        assert caption == next(each["caption"] for each in annotations if str(each["image_id"]) == key)


def test_photographs_are_the_pixels_that_pillow_decodes_and_damaged_ones_are_named(tmp_path):
    for file in sorted((REAL / "coco_images_cc_by").glob("*.jpg")):
        np.testing.assert_array_equal(read_image(file), np.asarray(Image.open(file).convert("RGB")))
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-5000])
        with pytest.raises(ValueError, match=rf"{file.name}: cannot be read as an image"):
            read_image(tmp_path / file.name)
