"""Views of pictures, and the items that masks become."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from flax import nnx

from seg4diff_jax.data.crops import View
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.folder import LabelledFolder
from seg4diff_jax.data.image_captions import ImageCaptions, first_sentences
from seg4diff_jax.data.loader import training_batches
from seg4diff_jax.data.sa1b import MaskFolder
from seg4diff_jax.magnet.encoded_items import hash_of_files, sum_of_weights
from seg4diff_jax.magnet.held_out import HeldOutData, open_both
from seg4diff_jax.magnet.items import MaskData, Pictures, ViewItems, mirrored, open_pictures
from seg4diff_jax.miniature.world.shapes import CLASSES, scene, write_folder
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.text import class_prompts, load_tokenizers, tokenize
from tests.reference.nameless import write_nameless


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder") / "scenes"
    write_folder(root, [scene("train", index, 64) for index in range(6)])
    return root


@pytest.fixture(scope="module")
def tokenizers(sd3_checkpoint):
    return load_tokenizers(sd3_checkpoint)


def items_of(folder, tokenizers, **options) -> tuple[Pictures, ViewItems]:
    data = MaskData(root=str(folder), size=32, **options)
    pictures = open_pictures(data, 32)
    return pictures, ViewItems(pictures, data, 32, tokenizers)


@pytest.fixture(scope="module")
def nameless(tmp_path_factory):
    from pycocotools import mask as run_lengths

    root = tmp_path_factory.mktemp("nameless")
    write_nameless(root, run_lengths)
    return root


def test_a_view_shows_the_same_of_a_picture_and_of_its_labels():
    labels = np.repeat(np.repeat(np.arange(24, dtype=np.uint8).reshape(4, 6), 8, axis=0), 8, axis=1)
    image = np.repeat(labels[..., None], 3, axis=2)
    random = np.random.default_rng(0)
    for crop in ("random", "center", "squash"):
        for mirror in (False, True):
            view = View.of((32, 48), crop, random)._replace(mirrored=mirror)
            assert (view.right - view.left, view.bottom - view.top) == ((48, 32) if crop == "squash" else (32, 32))
            drawn = view.nearest(labels, 32)
            if crop == "squash":
                continue
            np.testing.assert_array_equal(view.picture(image, 32)[..., 0], drawn)
    places = {View.of((32, 48), "random", random).left for _ in range(200)}
    assert (min(places), max(places)) == (0, 16)


def test_a_mirrored_view_is_the_mirror_image():
    shown = scene("train", 0, 64)
    view = View.of((64, 64), "center")
    turned = view._replace(mirrored=True)
    np.testing.assert_array_equal(turned.picture(shown.image, 32), view.picture(shown.image, 32)[:, ::-1])
    np.testing.assert_array_equal(turned.nearest(shown.labels, 32), view.nearest(shown.labels, 32)[:, ::-1])


def test_the_prompt_is_the_names_of_the_classes_in_the_view(folder, tokenizers):
    pictures, items = items_of(folder, tokenizers, crop="center")
    item = items.fixed(pictures.source[0])
    present = sorted({*np.unique(item["labels"]).tolist()} - {IGNORED})
    assert item["class_of_row"].tolist() == present + [IGNORED] * (16 - len(present))
    names = [CLASSES[index] for index in present]
    np.testing.assert_array_equal(item["clip_l"], tokenize(tokenizers, [" ".join(names)]).clip_l[0])
    np.testing.assert_array_equal(item["averaging"], class_prompts(tokenizers, names).averaging(16)[0])


def test_the_largest_classes_are_kept_when_rows_are_few(folder, tokenizers):
    pictures, items = items_of(folder, tokenizers, crop="center", rows=2)
    item = items.fixed(pictures.source[0])
    areas = np.bincount(item["labels"].ravel(), minlength=len(CLASSES))
    assert item["class_of_row"].tolist() == sorted(np.argsort(-areas, kind="stable")[:2].tolist())


def test_a_view_without_a_class_has_the_empty_prompt(folder, tokenizers):
    _, items = items_of(folder, tokenizers, crop="center")
    image, labels = scene("train", 0, 64).image, np.full((64, 64), IGNORED, np.uint8)
    item = items.fixed({"image": image, "labels": labels})
    assert set(item["class_of_row"].tolist()) == {IGNORED}
    assert not item["averaging"].any()
    np.testing.assert_array_equal(item["clip_l"], tokenize(tokenizers, [""]).clip_l[0])


def test_views_depend_on_seed_and_place_in_the_run_alone(folder, tokenizers):
    pictures, items = items_of(folder, tokenizers)
    take = lambda **how: training_batches(pictures.source, batch_size=2, augment=items, **how)
    batches, again, other = take(seed=1), take(seed=1), take(seed=2)
    first = [next(batches) for _ in range(9)]
    rest = [next(batches)["image"] for _ in range(3)]
    np.testing.assert_array_equal([next(again)["image"] for _ in range(9)], [batch["image"] for batch in first])
    resumed = take(seed=1, start=9)
    np.testing.assert_array_equal([next(resumed)["image"] for _ in range(3)], rest)
    assert any((next(other)["image"] != batch["image"]).any() for batch in first)
    seen = [batch["image"][row] for batch in first for row in range(2) if batch["index"][row] == 0]
    assert len(seen) == 3
    assert any((picture != seen[0]).any() for picture in seen[1:])  # mirrored in some epochs
    hosts = [take(seed=1, process=(i, 2)) for i in range(2)]
    for batch in first:
        shared = np.concatenate([next(host)["image"] for host in hosts])
        assert sorted(map(bytes, shared)) == sorted(map(bytes, batch["image"]))


def test_mirroring_an_item_is_seeing_it_mirrored(folder, nameless, tokenizers):
    labelled = items_of(folder, tokenizers, crop="center")
    data = MaskData("sa1b", str(nameless), size=32, crop="center")
    masked = open_pictures(data, 32)
    for pictures, items in (labelled, (masked, ViewItems(masked, data, 32, tokenizers))):
        item = pictures.source[1]
        view = View.of((64, 64), "center")
        turned, expected = mirrored(items.seen(item, view)), items.seen(item, view, True)
        for name in turned:
            np.testing.assert_array_equal(turned[name], expected[name])


def test_masks_without_names_come_largest_first_and_small_ones_are_dropped(nameless, tokenizers):
    data = MaskData("sa1b", str(nameless), captions=str(nameless / "captions.json"), size=64, crop="center", rows=4)
    pictures = open_pictures(data, 64)
    item = ViewItems(pictures, data, 64, tokenizers).fixed(pictures.source[0])
    masks = np.unpackbits(item["masks"], axis=-1)
    assert item["real"].tolist() == [True, True, False, False]
    assert masks.sum(axis=(1, 2)).tolist() == [1600, 256, 0, 0]
    np.testing.assert_array_equal(item["clip_l"], tokenize(tokenizers, ["A ball. On sand."]).clip_l[0])


def test_pictures_without_a_caption_are_named_and_have_the_empty_prompt(nameless):
    source = MaskFolder(nameless, nameless / "captions.json")
    assert source.captions.absent == ["sa_2"]
    assert source[1]["caption"] == ""
    assert first_sentences("no stop at all") == "no stop at all"
    assert first_sentences("It is 2.5 m long. Two. Three.") == "It is 2.5 m long. Two."


def test_captions_of_other_pictures_are_refused(nameless, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"pic_1": "A ball.", "pic_2": "Sand."}))
    with pytest.raises(
        FolderError, match=r"has a caption for none of the 2 pictures: its first key is 'pic_1', .* be '1'"
    ):
        MaskFolder(nameless, tmp_path / "captions.json")


def test_captions_are_read_in_every_published_form(tmp_path):
    names = ["sa_1", "000000000139", "my dog"]
    forms = (
        {"1": "A.", "139": "B.", "my dog": "C."},
        {"sa_1": "A.", "000000000139": "B.", "my dog": "C."},
        {"annotations": [{"image_id": each, "caption": text} for each, text in ((139, "B."), (1, "A."), (139, "X."))]},
    )
    for number, form in enumerate(forms):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(form))
        captions = ImageCaptions(names, file)
        assert [captions(name) for name in names] == ["A.", "B.", "C." if number < 2 else ""]
        assert captions.absent == ([] if number < 2 else ["my dog"])
    for broken in ("{", '["A."]', '{"1": 2}', '{"annotations": [{"caption": "A."}]}'):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(FolderError, match=r"broken\.json.* expected a JSON object"):
            ImageCaptions(names, tmp_path / "broken.json")


def test_labelled_pictures_with_captions_have_masks_without_names(folder, tokenizers, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"0": "A ball on sand. Nothing else. And more."}))
    named = open_pictures(MaskData(root=str(folder), size=32), 32)
    pictures, items = items_of(folder, tokenizers, captions=str(tmp_path / "captions.json"), rows=4, crop="squash")
    assert pictures.classes is None
    assert list(pictures.uncaptioned) == list(named.names[1:])
    item, labels = pictures.source[0], named.source[0]["labels"]
    present, areas = np.unique(labels[labels != 255], return_counts=True)
    assert [int(mask.sum()) for mask in item["masks"]] == sorted(areas.tolist(), reverse=True)
    assert {int(labels[mask][0]) for mask in item["masks"]} == {*present.tolist()}
    seen = items.fixed(item)
    masks = np.unpackbits(seen["masks"], axis=-1).astype(bool)[seen["real"]]
    small = View.of(labels.shape, "squash").nearest(labels, 32)
    assert all(len(np.unique(small[mask])) == 1 for mask in masks)
    assert [int(mask.sum()) for mask in masks] == sorted((int(mask.sum()) for mask in masks), reverse=True)
    expected = tokenize(tokenizers, ["A ball on sand. Nothing else."]).clip_l[0]
    np.testing.assert_array_equal(seen["clip_l"], expected)
    train, scored = open_both(pictures_data := items.data, HeldOutData(count=2), 32)
    assert pictures_data.nameless
    assert train.classes is None
    assert scored is not None
    assert scored.classes == named.classes


def test_pictures_that_are_trained_on_are_not_scored(folder, tmp_path):
    data = MaskData(root=str(folder), size=32)
    train, scored = open_both(data, HeldOutData(count=2), 32)
    assert scored is not None
    assert not {*train.names} & {*scored.names}
    for same in (HeldOutData(name="folder"), HeldOutData(root=str(folder / ".." / folder.name))):
        with pytest.raises(ValueError, match="held_out names the pictures that are trained on"):
            open_both(data, same, 32)
    with pytest.raises(ValueError, match="held_out names the pictures that are trained on"):
        open_both(MaskData(name="scenes", split="validation", size=32), HeldOutData(), 32)


def test_a_cache_of_other_files_or_weights_is_told_apart(folder, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    listed = hash_of_files(root, root / "cache")
    assert listed == hash_of_files(folder, tmp_path)
    (root / "cache").mkdir()
    (root / "cache" / "latents.npy").write_bytes(b"1")
    assert hash_of_files(root, root / "cache") == listed
    label = next((root / "labels").iterdir())
    label.write_bytes(label.read_bytes() + b"1")
    assert hash_of_files(root, root / "cache") != listed
    weights = [sum_of_weights(nnx.Linear(4, 4, rngs=nnx.Rngs(seed))) for seed in (0, 0, 1)]
    assert weights[0] == weights[1] != weights[2]


def test_damaged_masks_are_named(nameless, tmp_path):
    for file in nameless.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    contents = json.loads((tmp_path / "sa_1.json").read_text())
    contents["annotations"][2]["segmentation"]["size"] = [64, 65]
    (tmp_path / "sa_1.json").write_text(json.dumps(contents))
    (tmp_path / "sa_2.json").write_text("{")
    source = MaskFolder(tmp_path)
    with pytest.raises(FolderError, match=r"sa_1\.json, mask 0: a mask is of size \(64, 65\)"):
        source[0]["masks"][0]
    with pytest.raises(FolderError, match=r"sa_2\.json: not JSON: "):
        source[1]
    (tmp_path / "sa_2.json").unlink()
    with pytest.raises(FolderError, match=r"no \.json with masks beside sa_2\.jpg"):
        MaskFolder(tmp_path)


def test_a_folder_is_read_as_it_is(folder):
    pictures = open_pictures(MaskData(root=str(folder)), 64)
    assert pictures.classes == LabelledFolder(folder).classes == CLASSES
    assert pictures.names[0] == "00000"
