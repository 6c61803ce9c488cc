"""The synthetic world: scenes, their captions, their folder on disk."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.command_line import main
from seg4diff_jax.miniature.scenes import SceneItems
from seg4diff_jax.miniature.world.captions import BARE_SHARE, PLURALS
from seg4diff_jax.miniature.world.draws import Draws
from seg4diff_jax.miniature.world.shapes import CLASSES, STUFFS, THINGS, scene
from seg4diff_jax.miniature.world.stuffs import SIDE, TEXTURES
from seg4diff_jax.miniature.world.things import DRAWN

SINGULAR = {plural: name for name, plural in PLURALS.items()} | {name: name for name in CLASSES}

CAPTIONS = [
    "a large ring, the large leaf with one gray ball in front of water beside sky",
    "an image of one small black cookie and the ring over gray wood",
    "one moon on the right and a box on the left, brick next to snow behind",
]
"""Of the training scenes 0, 1 and 2^40."""
PIXELS = {"ball": 1138, "leaf": 1942, "ring": 1785, "sky": 7448, "water": 4071}
"""Of training scene 0, by class."""
MEAN_COLOR = (131.5, 96.6, 132.3)


@pytest.fixture(scope="module")
def scenes():
    return [scene("train", index) for index in range(250)]


def fingerprint(shown) -> str:
    return hashlib.sha256(shown.image.tobytes() + shown.labels.tobytes() + shown.caption.encode()).hexdigest()


def named(caption: str) -> list[str]:
    return [SINGULAR[word] for word in re.findall(r"\w+", caption) if word in SINGULAR]


def is_bare(caption: str) -> bool:
    return all(word in CLASSES for word in caption.split(" "))


# ---- the same for everybody -----------------------------------------------------------------------------------------


def test_a_scene_is_the_same_in_another_process():
    code = "from tests.miniature.test_shapes import fingerprint, scene; print(fingerprint(scene('validation', 7)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert found.stdout.strip() == fingerprint(scene("validation", 7))


def test_random_numbers_are_philox_output_of_two_keys():
    raw = np.random.Philox(key=np.array([2, 5], np.uint64)).random_raw(Draws.BLOCK)
    assert Draws(2, 5).unit() == (int(raw[-1]) >> 11) / 2**53
    assert Draws(2, 5).unit() != Draws(5, 2).unit()


def test_random_numbers_are_uniform():
    draws = Draws(0, 0)
    for values in (np.array([draws.unit() for _ in range(2000)]), draws.table(40, 50).ravel()):
        counts = np.histogram(values, bins=10, range=(0, 1))[0]
        assert values.min() >= 0
        assert values.max() < 1
        assert ((counts - 200) ** 2 / 200).sum() < 28  # chi squared, 9 degrees of freedom: one in 1000


def test_splits_share_no_scene():
    found = {fingerprint(scene(split, index)) for split in ("train", "validation", "test") for index in range(25)}
    assert len(found) == 75


def test_another_size_shows_the_same_scene():
    for index in range(8):
        small, large = scene("test", index, 64), scene("test", index, 256)
        assert small.caption == large.caption
        blocks = large.labels.reshape(64, 4, 64, 4).swapaxes(1, 2).reshape(64, 64, 16)
        majority = np.array([[np.bincount(block).argmax() for block in row] for row in blocks])
        assert np.mean(small.labels == majority) > 0.99
        mean = large.image.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(small.image - mean).mean() < 16


def test_scenes_are_still_those_that_the_miniature_was_trained_on():
    """Captions do not depend on how a platform rounds sines; how many pixels a class has hardly does."""
    captions = [scene("train", index).caption for index in (0, 1, 2**40)]
    assert captions == CAPTIONS
    image, labels, *_ = scene("train", 0)
    counts = {CLASSES[index]: np.count_nonzero(labels == index) for index in np.unique(labels)}
    assert counts == pytest.approx(PIXELS, abs=10)
    np.testing.assert_allclose(image.mean((0, 1)), MEAN_COLOR, atol=0.5)


def test_unknown_splits_and_negative_indices_are_refused():
    with pytest.raises(ValueError, match=r"'trian'.*train, validation, test"):
        scene("trian", 0)
    with pytest.raises(ValueError, match="index=-1"):
        scene("train", -1)


# ---- labels, classes, captions --------------------------------------------------------------------------------------


def test_what_is_labelled_is_what_classes_list_and_what_the_caption_names(scenes):
    for shown in scenes:
        assert tuple(np.unique(shown.labels)) == shown.classes
        assert sorted(named(shown.caption)) == sorted(CLASSES[index] for index in shown.classes)


def test_every_class_in_a_scene_is_large_enough_to_see(scenes):
    assert min(np.bincount(shown.labels.ravel())[list(shown.classes)].min() for shown in scenes) > 200


def test_a_scene_has_one_to_four_things_on_one_or_two_stuffs(scenes):
    things = [sum(index < len(THINGS) for index in shown.classes) for shown in scenes]
    stuffs = [len(shown.classes) - count for shown, count in zip(scenes, things, strict=True)]
    assert set(things) == {1, 2, 3, 4}
    assert set(stuffs) == {1, 2}


def test_a_fifth_of_the_captions_are_class_names_alone(scenes):
    share = np.mean([is_bare(shown.caption) for shown in scenes])
    assert abs(share - BARE_SHARE) < 4 * np.sqrt(BARE_SHARE * (1 - BARE_SHARE) / len(scenes))


def test_captions_vary_and_are_plain_prose(scenes):
    captions = [shown.caption for shown in scenes]
    assert len(set(captions)) > 0.9 * len(captions)
    for text in captions:
        assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", text), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_classes_are_about_equally_frequent(scenes):
    counts = np.bincount(np.concatenate([shown.classes for shown in scenes]), minlength=len(CLASSES))
    for group in (counts[: len(THINGS)], counts[len(THINGS) :]):
        assert np.abs(group - group.mean()).max() < 4 * np.sqrt(group.mean())


def test_colours_do_not_give_the_class_away(scenes):
    """A classifier by the mean colour of a class's region, fitted on half of the scenes, on the other half."""
    colors, classes, first_half = [], [], []
    for number, shown in enumerate(scenes):
        for index in shown.classes:
            colors.append(shown.image[shown.labels == index].mean(0))
            classes.append(index)
            first_half.append(number < len(scenes) // 2)
    colors, classes, fit = np.array(colors), np.array(classes), np.array(first_half)
    for group in (range(len(THINGS)), range(len(THINGS), len(CLASSES))):
        centres = np.stack([colors[fit & (classes == index)].mean(0) for index in group])
        test = ~fit & np.isin(classes, list(group))
        nearest = np.argmin(((colors[test][:, None] - centres) ** 2).sum(-1), axis=1) + group[0]
        chance = 1 / len(group)
        assert np.mean(nearest == classes[test]) < chance + 4 * np.sqrt(chance * (1 - chance) / test.sum())


# ---- patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THINGS)
def test_a_thing_lies_within_its_radius_and_its_tones_within_their_range(name):
    axis = np.arange(-40, 40, 0.5, dtype=np.float32) + np.float32(0.25)
    x, y = np.meshgrid(axis, axis)
    for index in range(6):
        draws = Draws(9, index)
        radius = draws.uniform(14, 36)
        inside, tone = DRAWN[name].draw(x, y, radius, draws)
        assert np.hypot(x, y)[inside].max() <= 1.02 * radius
        assert tone[inside].min() >= 0
        assert tone[inside].max() <= 1
        assert np.ptp(tone[inside]) > 0.5
        area = inside.sum() / 4 * DRAWN[name].stretch ** 2
        assert 1.8 * radius**2 < area < 2.6 * radius**2  # all things are about as large


@pytest.mark.parametrize("name", STUFFS)
def test_a_stuff_keeps_its_tones_within_their_range_and_fills_every_part_of_the_picture(name):
    axis = np.arange(0.25, SIDE, 0.5, dtype=np.float32)
    for index in range(6):
        tone = TEXTURES[name](axis[None], axis[:, None], Draws(9, index))
        assert tone.shape == (256, 256)
        assert tone.min() >= 0
        assert tone.max() <= 1
        if name != "sky":  # a sky may be clear
            assert np.ptp(tone.reshape(8, 32, 8, 32), axis=(1, 3)).min() > 0.2


# ---- as a source and on disk ----------------------------------------------------------------------------------------


def test_the_source_is_random_access_of_fixed_length_and_travels_to_workers():
    source = pickle.loads(pickle.dumps(SceneItems("test", 3, 64)))
    assert len(source) == 3
    shown = scene("test", 2, 64)
    np.testing.assert_array_equal(source[2]["image"], shown.image)
    np.testing.assert_array_equal(source[2]["labels"], shown.labels)
    assert bytes(source[2]["caption"]).rstrip(b"\0").decode() == shown.caption


def test_a_folder_holds_what_the_scenes_hold(tmp_path):
    assert main(["scenes", str(tmp_path / "world"), "--split", "validation", "--count", "3", "--size", "64"]) == 0
    folder = tmp_path / "world"
    names = (folder / "classes.txt").read_text().splitlines()
    captions = json.loads((folder / "captions.json").read_text())
    files = sorted((folder / "images").iterdir())
    assert len(files) == len(captions) == 3
    for index, file in enumerate(files):
        shown = scene("validation", index, 64)
        labels = Image.open(folder / "labels" / file.name)
        assert labels.mode == "L"
        np.testing.assert_array_equal(np.asarray(Image.open(file)), shown.image)
        np.testing.assert_array_equal(np.asarray(labels), shown.labels)
        assert {names[value] for value in np.unique(np.asarray(labels))} == set(named(captions[file.stem]))


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "mine.png").touch()
    assert main(["scenes", str(tmp_path), "--count", "1"]) == 1
    assert "not empty" in capsys.readouterr().err
    assert not list((tmp_path / "images").iterdir())


def test_the_sheet_is_a_picture(tmp_path):
    assert main(["scenes", "--sheet", str(tmp_path / "sheet.png"), "--count", "4", "--size", "64"]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000
