"""ImageNet-Segmentation in both forms, in files that the tests make: no published file is read here."""

from __future__ import annotations

import pickle
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.command_line import main
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.sets import SETS
from seg4diff_jax.data.single_objects import SIDE, at_side
from tests.reference.label_files import GRAY, label, picture, text
from tests.reference.matlab_file import WORDS, Record, some_records, write_matlab

SET = SETS["imagenet-segmentation"]
ROOT = Path(__file__).parents[2]
SIZES = [(6, 9), (12, 5), (8, 8), (7, 10)]


@pytest.fixture
def records() -> list[Record]:
    return some_records(*SIZES)


@pytest.fixture
def root(tmp_path, records) -> Path:
    write_matlab(tmp_path / "gtsegs_ijcv.mat", records)
    text(tmp_path / "words.txt", WORDS)
    return tmp_path


@pytest.fixture
def folder(tmp_path) -> Path:
    picture(tmp_path / "images/second.jpg", (2, 3))
    picture(tmp_path / "images/first.png", (2, 3))
    label(tmp_path / "masks/second.png", [[0, 255, 255], [0, 0, 0]])
    label(tmp_path / "masks/first.png", [[0, 1, 1], [1, 0, 0]])
    text(tmp_path / "names.txt", ["second\tgarden spider", "first\tcat"])
    return tmp_path


# ---- the published file ---------------------------------------------------------------------------------------------


def test_images_masks_and_names_of_the_file_are_those_that_were_written(root, records):
    source = SET.open(root)
    assert (len(source), source.split) == (len(records), "val")
    assert source.names == [record.name for record in records]
    assert source.objects == ("tench", "dog", "Egyptian cat", "tench")
    for index, record in enumerate(records):
        item = source[index]
        np.testing.assert_array_equal(item["image"], record.image)
        np.testing.assert_array_equal(item["labels"], 1 - record.mask)  # foreground is class 0
        assert (item["labels"].dtype, item["name"]) == (np.uint8, record.name)


def test_public_loaders_read_the_file_as_we_do(root):
    import h5py

    source = SET.open(root)
    with h5py.File(root / "gtsegs_ijcv.mat") as file:
        for index in range(len(source)):  # the indexing of Chefer et al.'s loader
            image = np.array(file[file["/value/img"][index, 0]]).transpose((2, 1, 0))
            mask = np.array(file[file[file["/value/gt"][index, 0]][0, 0]]).transpose((1, 0))
            np.testing.assert_array_equal(source[index]["image"], image)
            np.testing.assert_array_equal(source[index]["labels"] == 0, mask == 1)


def test_workers_get_copies_of_the_source(root):
    source = SET.open(root)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[2]["labels"], source[2]["labels"])


def rewritten(root: Path, records: list[Record], **instead) -> Path:
    (root / "gtsegs_ijcv.mat").unlink()
    return write_matlab(root / "gtsegs_ijcv.mat", records, **instead)


@pytest.mark.parametrize("member", ["img", "gt", "id"])
def test_a_member_that_is_missing_or_no_references_is_named(root, records, member):
    for instead in (None, np.zeros((4, 1))):
        rewritten(root, records, **{member: instead})
        with pytest.raises(FolderError, match=rf"gtsegs_ijcv\.mat has no value/{member} of \[images, 1\] references"):
            SET.open(root)


@pytest.mark.parametrize("contents", [b"", b"MATLAB 5.0 MAT-file, Platform: GLNXA64" + bytes(600), b"no such thing"])
def test_a_file_that_is_not_hdf5_is_refused(root, contents):
    (root / "gtsegs_ijcv.mat").write_bytes(contents)
    with pytest.raises(
        FolderError, match=r"gtsegs_ijcv\.mat is not HDF5, as MATLAB's version 7\.3 writes it; expected"
    ):
        SET.open(root)


def test_a_file_that_is_cut_off_is_refused(root):
    file = root / "gtsegs_ijcv.mat"
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(FolderError, match=r"gtsegs_ijcv\.mat.* cannot be read: "):
        SET.open(root)


def changed(record: Record, **parts) -> Record:
    return record._replace(**parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"mask": np.ones((6, 8))}, r"image 1 \(n01440764_7\): the mask is 6 x 8 pixels and the image 6 x 9: expected"),
        ({"mask": np.full((6, 9), 2)}, r"image 1 .*: 54 pixels have the value 2; expected 0 for background and 1"),
        (
            {"image": np.zeros((6, 9, 4), np.uint8)},
            r"value/img is uint8 \[4, 9, 6\]; expected uint8 \[3, width, height\]",
        ),
        ({"image": np.zeros((6, 9, 3), np.float64)}, r"value/img holds values of type float64; expected whole numbers"),
        ({"mask": np.ones((6, 9, 1))}, r"value/gt is uint8 \[1, 9, 6\]; expected \[width, height\]"),
    ],
)
def test_an_image_or_mask_of_another_kind_is_refused_when_its_turn_comes(root, records, parts, message):
    rewritten(root, [changed(records[0], **parts), *records[1:]])
    source = SET.open(root)
    assert source[1]["image"].shape == (12, 5, 3)
    with pytest.raises(FolderError, match=message):
        source[0]


def test_an_image_without_a_listed_class_is_refused(root, records):
    text(root / "words.txt", "\n".join(WORDS.splitlines()[:2]))
    with pytest.raises(
        FolderError, match=r"words\.txt has no line for n02124075, the class of image 3 \(n02124075_9\)"
    ):
        SET.open(root)
    text(root / "words.txt", ["n01440764 tench"])
    with pytest.raises(FolderError, match=r"words\.txt, line 1 is 'n01440764 tench'; expected a class and its names"):
        SET.open(root)
    (root / "words.txt").unlink()
    with pytest.raises(FolderError, match=r"words\.txt: no such file"):
        SET.open(root)
    rewritten(root, [changed(records[0], name="tench_7")])
    with pytest.raises(FolderError, match=r"image 1, value/id is 'tench_7'; expected one such as n01440764_10026"):
        SET.open(root)


def test_members_of_several_lengths_are_refused(root, records):
    import h5py

    rewritten(root, records)
    with h5py.File(root / "gtsegs_ijcv.mat", "r+") as file:
        fewer = file["value/gt"][:2]
        del file["value/gt"]
        file["value/gt"] = fewer.astype(h5py.ref_dtype)
    with pytest.raises(FolderError, match="has 4 in value/img, 2 in value/gt, 4 in value/id: expected as many of each"):
        SET.open(root)


def test_without_h5py_a_sentence_says_what_to_install(root, sd3_checkpoint, monkeypatch, capsys):
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["evaluate"]
    monkeypatch.setattr("seg4diff_jax.extras.requires", lambda _: [f'{each}; extra == "evaluate"' for each in extra])
    monkeypatch.setitem(sys.modules, "h5py", None)
    options = ["--model", str(sd3_checkpoint), "--blocks", "0", "--steps", "8", "--out", str(root / "out")]
    assert main(["evaluate", *options, "--data.name", "imagenet-segmentation", "--data.root", str(root)]) == 1
    assert re.search(r"h5py is not installed: .*pip install -e '\.\[evaluate\]'", capsys.readouterr().err)


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_a_folder_has_the_images_of_its_list_in_that_order(folder):
    source = SET.open(folder)
    assert (source.names, source.objects) == (["second", "first"], ("garden spider", "cat"))
    np.testing.assert_array_equal(source[0]["labels"], [[1, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(source[1]["labels"], [[1, 0, 0], [0, 1, 1]])
    assert (source[1]["image"] == GRAY).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: text(root / "names.txt", ["first\tcat"]),
            r"names\.txt does not say .* images/second\.jpg is called",
        ),
        (
            lambda root: text(root / "names.txt", ["third\tcat"]),
            r"names\.txt names third, of which .*images has no image",
        ),
        (
            lambda root: text(root / "names.txt", ["first cat"]),
            r"names\.txt, line 1 is 'first cat'; expected an image and",
        ),
        (
            lambda root: text(root / "names.txt", ["first\t"]),
            r"names\.txt, line 1 is 'first'; expected an image and",
        ),
        (
            lambda root: text(root / "names.txt", ["a\tb", "a\tc"]),
            r"names\.txt, line 2 names a again; expected each once",
        ),
        (lambda root: text(root / "names.txt", []), r"names\.txt is empty; expected an image and"),
        (lambda root: picture(root / "images/first.jpg"), r"first\.jpg and first\.png share one name, and so one mask"),
        (lambda root: (root / "masks").rename(root / "others"), r"holds no masks; expected gtsegs_ijcv\.mat"),
        (lambda root: (root / "names.txt").unlink(), r"holds no gtsegs_ijcv\.mat or names\.txt; expected"),
    ],
)
def test_a_folder_that_is_not_as_described_is_refused(folder, change, message):
    change(folder)
    with pytest.raises(FolderError, match=message):
        SET.open(folder)


def test_masks_that_do_not_fit_are_refused_when_their_turn_comes(folder):
    label(folder / "masks/second.png", [[0, 1], [1, 0]])
    label(folder / "masks/first.png", [[0, 1, 7], [1, 0, 0]])
    source = SET.open(folder)
    with pytest.raises(FolderError, match=r"second\.png is 2 x 2 pixels and its image 2 x 3 "):
        source[0]
    with pytest.raises(
        FolderError, match=r"first\.png: 1 pixels have the value 7; expected 0 for background and 1, or 255"
    ):
        source[1]
    (folder / "masks/first.png").unlink()
    with pytest.raises(FolderError, match=r"masks/first\.png: no such file"):
        source[1]


def test_it_is_one_set_with_one_kind_of_labels(folder):
    assert SET.open(folder, "validation").split == "val"
    with pytest.raises(ValueError, match=r"data\.split is 'train': ImageNet-Segmentation has val"):
        SET.open(folder, "train")
    with pytest.raises(ValueError, match=r"data\.labels is 'gt': ImageNet-Segmentation has labels of one kind"):
        SET.open(folder, None, "gt")


# ---- the square -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(375, 500), (100, 60), (224, 224)])
def test_labels_come_to_the_square_as_torchvision_resizes_a_mask(size):
    drawn = np.random.default_rng(0).choice([0, 1, 255], size).astype(np.uint8)
    # transforms.Resize((224, 224), Image.NEAREST) of a Pillow image is Pillow's own
    expected = np.asarray(Image.fromarray(drawn).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(at_side(drawn), expected)
    rows, columns = (np.floor((np.arange(SIDE) + 0.5) * side / SIDE).astype(int) for side in size)
    np.testing.assert_array_equal(at_side(drawn), drawn[rows][:, columns])
