"""ADE20K's scene parsing benchmark as it is handed out: label 0, both splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.sets import SETS
from tests.reference.label_files import label, picture

ADE = SETS["ade20k150"]


@pytest.fixture
def root(tmp_path) -> Path:
    home = tmp_path / "ADEChallengeData2016"
    for split, name in (
        ("validation", "ADE_val_00000002"),
        ("validation", "ADE_val_00000001"),
        ("training", "ADE_train_1"),
    ):
        picture(home / f"images/{split}/{name}.jpg")
        label(home / f"annotations/{split}/{name}.png", [[0, 1, 2], [150, 7, 0]])
    return tmp_path


def test_classes_count_from_0_and_label_0_is_ignored(root):
    np.testing.assert_array_equal(ADE.open(root)[0]["labels"], [[255, 0, 1], [149, 6, 255]])
    assert len(ADE.classes) == 150
    assert (ADE.classes[0], ADE.classes[6], ADE.classes[149]) == ("wall", "road", "flag")


def test_splits_are_directories_in_alphabetical_order(root):
    source = ADE.open(root)
    assert source.split == "validation"
    assert [item["name"] for item in (source[0], source[1])] == ["ADE_val_00000001", "ADE_val_00000002"]
    assert ADE.open(root, "val").names == source.names
    assert ADE.open(root / "ADEChallengeData2016", "train").names == ["ADE_train_1"]
    with pytest.raises(ValueError, match=r"data\.split is 'test': ADE20K has validation, training"):
        ADE.open(root, "test")


def test_a_label_that_is_absent_or_beyond_the_classes_is_named(root):
    labels = root / "ADEChallengeData2016/annotations/validation"
    (labels / "ADE_val_00000001.png").unlink()
    label(labels / "ADE_val_00000002.png", [[151, 3, 200], [1, 1, 1]])
    source = ADE.open(root)
    with pytest.raises(FolderError, match=r"ADE_val_00000001\.png: no such file"):
        source[0]
    with pytest.raises(FolderError, match=r"00000002\.png: 2 pixels have values from 151 to 200; ADE20K's 150 classes"):
        source[1]


def test_what_is_not_where_it_should_be_is_named_with_its_origin(root):
    with pytest.raises(FolderError, match=r"holds no annotations or ADEChallengeData2016/annotations.*Scene Parsing"):
        ADE.open(root / "ADEChallengeData2016/images")
    for file in (root / "ADEChallengeData2016/images/validation").iterdir():
        file.unlink()
    with pytest.raises(FolderError, match=r"images/validation holds no \*\.jpg; expected ADEChallengeData2016"):
        ADE.open(root)
