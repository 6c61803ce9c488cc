"""A file of names chooses images of any set; the square in the middle is all that `paper` sees of one."""

from __future__ import annotations

import codecs
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.batching import ModelView
from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.data.ade20k import read_ade20k
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.folder import LabelledFolder
from seg4diff_jax.data.labelled import images_in
from seg4diff_jax.data.sa1b import MaskFolder
from seg4diff_jax.data.sets import SETS
from seg4diff_jax.data.subset import listed_places
from seg4diff_jax.evaluation.batches import Example, LeftOut, Reader
from seg4diff_jax.evaluation.benchmarks import Benchmark, open_benchmark
from seg4diff_jax.evaluation.options import Data
from seg4diff_jax.images import resize, to_model_range
from seg4diff_jax.magnet.items import MaskData, open_pictures
from tests.reference.label_files import label, picture, text

NAMES = ["a.b", "000000000139", "frankfurt_000000_000294", "my photo"]
SIDE = 64


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("000000000139", 1),
        ("000000000139.jpg", 1),
        ("val2017/000000000139.jpg", 1),
        (r"val2017\\000000000139.jpg", 1),
        ("JPEGImages/000000000139.jpg SegmentationClass/000000000139.png", 1),
        ("a.b", 0),
        ("a.b.jpg", 0),
        ("my photo", 3),
        ("my photo.png", 3),
        ("leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png", 2),
    ],
)
def test_a_name_may_be_a_path_and_have_a_suffix(tmp_path, line, place):
    assert listed_places(text(tmp_path / "list.txt", line), NAMES, "a set") == [place]


def test_a_list_chooses_and_orders_whatever_editor_saved_it(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(codecs.BOM_UTF16_LE + "my photo\r\n\r\n000000000139\r\n".encode("utf-16-le"))
    assert listed_places(file, NAMES, "a set") == [3, 1]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            ["000000000139", "cat", "dog"],
            r"lists what is no image of a set: cat \(line 2\), dog \(line 3\); expected na",
        ),
        (
            ["000000000139", "", "000000000139.jpg"],
            "lists 000000000139 in line 1 and in line 3; expected each image once",
        ),
        (["", ""], "lists nothing; expected names of images"),
    ],
)
def test_an_absent_image_one_listed_twice_and_an_empty_list_are_refused(tmp_path, lines, problem):
    with pytest.raises(FolderError, match=rf"list\.txt {problem}"):
        listed_places(text(tmp_path / "list.txt", lines), NAMES, "a set")


def write_folder(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        picture(root / f"images/{name}.png", (4, 4 + number))
        label(root / f"labels/{name}.png", np.full((4, 4 + number), number % 2))
    text(root / "classes.txt", ["cat", "sofa"])
    return root


def test_images_of_folders_sets_and_training_are_chosen_in_the_order_of_the_list(tmp_path):
    root = write_folder(tmp_path / "own", "a", "b", "c")
    listed = str(text(tmp_path / "list.txt", ["c.png", "a"]))
    benchmark = open_benchmark(Data(root=str(root), list=listed), SIDE)
    assert [benchmark.source[index]["name"] for index in range(len(benchmark.source))] == ["c", "a"]
    assert benchmark.source[0]["image"].shape == (4, 6, 3)
    assert benchmark.where.endswith(f"of {listed}")
    pictures = open_pictures(MaskData(root=str(root), list=listed), SIDE)
    assert (list(pictures.names), pictures.source[0]["image"].shape) == (["c", "a"], (4, 6, 3))
    captions = text(tmp_path / "captions.json", {"a": "A cat.", "b": "A sofa."})
    captioned = open_pictures(MaskData(root=str(root), list=listed, captions=str(captions)), SIDE)
    assert ([item["caption"] for item in map(captioned.source.__getitem__, range(2))]) == ["", "A cat."]
    assert list(captioned.uncaptioned) == ["c"]
    with pytest.raises(FolderError, match=r"lists what is no image of .*own: d \(line 1\)"):
        open_benchmark(Data(root=str(root), list=str(text(tmp_path / "wrong.txt", "d"))), SIDE)


def test_results_record_the_list_and_the_papers_figures_are_not_of_it(tmp_path, sd3_checkpoint):
    root = write_folder(tmp_path / "own", "a", "b", "c")
    listed = str(text(tmp_path / "list.txt", ["c", "a"]))
    options = ["--model", str(sd3_checkpoint), "--blocks", "0", "--steps", "8", "--seeds", "0", "--batch-size", "1"]
    options += ["--data.root", str(root), "--data.list", listed, "--data.resize", "paper", "--pictures", "1"]
    assert main([*options, "--out", str(tmp_path / "out")]) == 0
    contents = json.loads((tmp_path / "out/results.json").read_text())
    (row,) = contents["rows"]
    assert (row["images"], row["list"], row["reported"], contents["config"]["data"]["list"]) == (
        2,
        listed,
        [],
        listed,
    )
    assert (row["resize"], row["pixels"], row["cut_off"]) == ("paper", 16 + 16, 8)
    assert "without a prediction and not scored: 8 pixels, 20.0 %" in (tmp_path / "out/report.html").read_text()


# ---- what is no image -----------------------------------------------------------------------------------------------


def test_files_whose_name_starts_with_a_dot_are_images_of_no_set(tmp_path):
    root = write_folder(tmp_path / "own", "a", "b")
    home = tmp_path / "ADEChallengeData2016"
    for name in ("a", "b"):
        picture(home / f"images/validation/{name}.jpg")
        label(home / f"annotations/validation/{name}.png", np.zeros((2, 3), int))
        picture(tmp_path / f"masks/{name}.jpg")
        text(tmp_path / f"masks/{name}.json", {"annotations": []})
    for folder in (root / "images", home / "images/validation", tmp_path / "masks"):
        (folder / "._a.jpg").write_bytes(b"\0\5\x16\7")
        (folder / ".DS_Store").write_bytes(b"\0")
    assert LabelledFolder(root).names == read_ade20k(home, None, None, SETS["ade20k150"].ids).names == ["a", "b"]
    assert MaskFolder(tmp_path / "masks").names == ["a", "b"]
    picture(tmp_path / "val/.trash/c.jpg")
    picture(tmp_path / "val/city/c.jpg")
    picture(tmp_path / "val/city/._c.jpg")
    assert images_in(tmp_path / "val", "*/*.jpg", "") == [tmp_path / "val/city/c.jpg"]


# ---- paper ----------------------------------------------------------------------------------------------------------


def read(root: Path, **options: str) -> tuple[Benchmark, list[Example | LeftOut]]:
    benchmark = open_benchmark(Data(root=str(root)), SIDE)
    reader = Reader(benchmark, ModelView(SIDE, 16, SIDE, 8, 16), **options)  # pyright: ignore[reportArgumentType]
    return benchmark, list(reader.read(range(len(benchmark.source))))


@pytest.mark.parametrize("size", [(40, 60), (61, 40), (50, 50)])
def test_the_square_in_the_middle_is_seen_and_scored_and_what_is_cut_off_is_counted(tmp_path, size):
    draw, side = np.random.default_rng(0), min(size)
    pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
    labels = draw.choice([0, 1, 255], size).astype(np.uint8)
    for name, array in (("images", pixels), ("labels", labels)):
        (tmp_path / name).mkdir()
        Image.fromarray(array).save(tmp_path / name / "a.png")
    text(tmp_path / "classes.txt", ["cat", "sofa"])
    _, (example,) = read(tmp_path, how="paper")
    top, left = ((each - side) // 2 for each in size)
    inside = slice(top, top + side), slice(left, left + side)
    np.testing.assert_array_equal(example.labels, labels[inside])
    np.testing.assert_array_equal(example.pixels, to_model_range(resize(pixels[inside], (SIDE, SIDE))))
    assert example.cut_off == (labels != 255).sum() - (labels[inside] != 255).sum()
    _, (whole,) = read(tmp_path)
    assert whole.cut_off == 0
    assert whole.histogram.sum() == example.histogram.sum() + example.cut_off


def test_an_image_with_labels_on_its_margins_alone_is_left_out_with_its_pixels_counted(tmp_path):
    picture(tmp_path / "images/a.png", (4, 8))
    label(tmp_path / "labels/a.png", np.where(np.arange(8) < 2, 1, 255) * np.ones((4, 1), int))
    text(tmp_path / "classes.txt", ["cat", "sofa"])
    _, (left_out,) = read(tmp_path, how="paper")
    assert left_out == LeftOut(0, "unlabelled", "a", 8)


def test_cut_off_background_that_is_not_scored_does_not_count(tmp_path):
    picture(tmp_path / "val2017/000000000001.jpg", (4, 8))
    label(
        tmp_path / "stuffthingmaps/val2017/000000000001.png", np.where(np.arange(8) < 2, 255, 0) * np.ones((4, 1), int)
    )
    benchmark = open_benchmark(Data(name="coco-object", root=str(tmp_path)), SIDE)
    view = ModelView(SIDE, 16, SIDE, 8, 16)
    assert Reader(benchmark, view, how="paper").example(0).cut_off == 4 * 2
    assert Reader(replace(benchmark, rule="scored"), view, how="paper").example(0).cut_off == 4 * 4
