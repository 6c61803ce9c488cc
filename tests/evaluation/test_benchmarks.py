"""From options to a benchmark: published sets, how classes are called, and what becomes of the background."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from seg4diff_jax.batching import ModelView
from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.sets import SETS
from seg4diff_jax.evaluation.batches import Example, LeftOut, Reader, assemble
from seg4diff_jax.evaluation.benchmarks import OTHERS, Benchmark, open_benchmark
from seg4diff_jax.evaluation.options import HELP, Data, parse
from seg4diff_jax.evaluation.vocabulary import PresentClasses, Vocabulary
from seg4diff_jax.text import class_prompts
from tests.reference.label_files import label, picture, text

SIDE = 64
PERSON, CAT, TREE, BRICK, WOODEN = 1, 17, 169, 171, 177
"""COCO's category ids."""


def write_coco(root: Path, *columns: tuple[int, ...]) -> Path:
    """COCO's layout: an image for each tuple of ids (0: unlabelled), whose label is stripes of them."""
    for number, ids in enumerate(columns):
        picture(root / f"val2017/{number:012d}.jpg", (SIDE, SIDE))
        stripes = np.repeat([255 if each == 0 else each - 1 for each in ids], SIDE // len(ids))
        label(root / f"stuffthingmaps/val2017/{number:012d}.png", np.tile(stripes, (SIDE, 1)))
    return root


def examples(benchmark: Benchmark) -> tuple[list[LeftOut], list[Example]]:
    items = list(Reader(benchmark, ModelView(SIDE, 16, SIDE, 8, 16)).read(range(len(benchmark.source))))
    left_out = [item for item in items if isinstance(item, LeftOut)]
    return left_out, [item for item in items if isinstance(item, Example)]


def test_a_set_is_opened_by_its_name_where_it_lies(tmp_path):
    root = write_coco(tmp_path, (PERSON, TREE))
    benchmark = open_benchmark(Data(name="coco-171", root=str(root), split="validation"), SIDE)
    assert (benchmark.name, benchmark.split, benchmark.kind) == ("coco-171", "val", "stuffthingmaps")
    assert benchmark.classes == benchmark.prompts == SETS["coco-171"].classes
    assert set(benchmark.groups) == {"things", "stuffs"}
    assert len(benchmark.source) == 1


def test_every_set_is_named_in_the_help():
    assert set(re.findall(r"[\w-]+", HELP["data.name"])) >= {*SETS, *OTHERS}


@pytest.mark.parametrize(
    ("rule", "present", "counted"),
    [
        (None, [("person",), ("person", "cat")], ["person", "cat"]),
        ("ignored", [("person",), ("person", "cat")], ["person", "cat"]),
        ("asked", [("background", "person"), ("person", "cat")], ["person", "cat"]),
        ("scored", [("background", "person"), ("person", "cat"), ("background",)], ["background", "person", "cat"]),
    ],
)
def test_background_is_ignored_asked_for_or_scored(tmp_path, rule, present, counted):
    root = write_coco(tmp_path, (PERSON, TREE), (PERSON, CAT), (TREE, 0))
    benchmark = open_benchmark(Data(name="coco-object", root=str(root), background=rule), SIDE)
    left_out, found = examples(benchmark)
    assert [tuple(benchmark.classes[index] for index in example.present) for example in found] == present
    histogram = sum(example.histogram for example in found)
    assert [benchmark.classes[index] for index in np.flatnonzero(histogram)] == counted
    assert all(np.array_equal(example.histogram[0] > 0, (example.labels == 0).any()) for example in found)
    assert [each.why for each in left_out] == ["unlabelled"] * (3 - len(found))


def test_background_that_is_asked_for_has_scores_but_no_pixel_to_win(tmp_path, sd3):
    root = write_coco(tmp_path, (PERSON, TREE))
    benchmark = open_benchmark(Data(name="coco-object", root=str(root), background="asked"), SIDE)
    _, found = examples(benchmark)
    batch = assemble(found, 1, PresentClasses(Vocabulary.of(benchmark, sd3.tokenizers)))
    assert batch.prompts[0].texts == ("background person",)
    assert batch.class_of_row[0, :2].tolist() == [0, 1]
    assert set(np.unique(batch.truth[0, :SIDE, :SIDE])) == {1, 255}


def test_names_are_spelled_as_asked_for_and_results_keep_the_sets_own(tmp_path):
    data = Data(name="coco-171", root=str(write_coco(tmp_path, (BRICK, WOODEN))))
    prompts = {how: open_benchmark(replace(data, names=how), SIDE).prompts for how in ("own", "readable", "release")}
    place = SETS["coco-171"].classes.index("wall-brick")
    assert [prompts[how][place] for how in prompts] == ["wall-brick", "brick wall", "wall"]
    assert open_benchmark(replace(data, names="readable"), SIDE).classes[place] == "wall-brick"


def test_classes_that_the_release_calls_the_same_have_places_of_their_own(tmp_path, sd3):
    with pytest.raises(ValueError, match="'wall' is repeated"):
        class_prompts(sd3.tokenizers, ["wall", "tree", "wall"])
    found = class_prompts(sd3.tokenizers, ["wall", "tree", "wall"], repeats=True)
    assert found.prompts == ("wall tree wall",)
    apart = class_prompts(sd3.tokenizers, ["wall", "tree"])
    assert found.spans[:2] == apart.spans
    assert found.spans[2].start == found.spans[1].stop
    assert found.averaging().sum(axis=2).tolist() == [pytest.approx([1, 1, 1])]


def test_results_record_the_set_its_split_its_labels_and_how_classes_were_called(tmp_path, sd3_checkpoint):
    root = write_coco(tmp_path / "coco", (BRICK, WOODEN, PERSON, TREE), (BRICK, TREE))
    options = ["--model", str(sd3_checkpoint), "--blocks", "0", "--steps", "8", "--seeds", "0", "--batch-size", "2"]
    options += ["--data.name", "coco-171", "--data.root", str(root), "--data.names", "release", "--pictures", "1"]
    assert main([*options, "--out", str(tmp_path / "out")]) == 0
    contents = json.loads((tmp_path / "out/results.json").read_text())
    for row in contents["rows"] + contents["baselines"]:
        assert (row["dataset"], row["split"], row["labels"], row["names"]) == (
            "coco-171",
            "val",
            "stuffthingmaps",
            "release",
        )
    scored = {name for name, iou in contents["rows"][0]["iou"].items() if iou is not None}
    assert scored == {"wall-brick", "wall-wood", "person", "tree"}
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    wanted = {"name": "coco-171", "split": "val", "labels": "stuffthingmaps", "names": "release"}
    assert {key: config["data"][key] for key in wanted} == wanted
    again = parse(["--config", str(tmp_path / "out/config.yaml")]).data
    assert again == Data(**config["data"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "voc"}, r"data\.name is 'voc': expected one of voc20, voc21, .*tfds, folder, scenes"),
        ({"name": "voc20"}, r"'voc20', but there is no data\.root: give the directory with VOCdevkit/VOC2012"),
        ({"name": "tfds"}, r"'tfds', but there is no data\.root"),
        ({"name": "scenes", "root": "."}, r"data\.root is '\.', but scenes lie in the user's cache"),
        ({"root": "FOLDER", "split": "val"}, "data.split is 'val', but a folder has no splits"),
        ({"root": "FOLDER", "labels": "x"}, "data.labels is 'x': folder has labels of one kind"),
        (
            {"root": "FOLDER", "background": "asked"},
            "folder has no background class; voc21, context60, coco-object have",
        ),
        ({"split": "val2017"}, "data.split is 'val2017': the synthetic world has test, validation, train"),
        ({"root": "FOLDER", "names": "readable"}, "'desk' and 'desk-stuff' would both be called 'desk'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, data, message):
    picture(tmp_path / "images/a.png")
    label(tmp_path / "labels/a.png", [[0, 1, 0]] * 2)
    text(tmp_path / "classes.txt", ["desk", "desk-stuff"])
    if data.get("root") == "FOLDER":
        data = {**data, "root": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        open_benchmark(Data(**data), SIDE)


def test_a_directory_without_the_set_is_refused_before_weights_are_read(sd3_checkpoint, tmp_path, capsys):
    options = ["--model", str(sd3_checkpoint), "--blocks", "0", "--data.root", str(tmp_path)]
    assert main([*options, "--data.name", "voc20", "--out", str(tmp_path / "out")]) == 1
    assert re.search(r"error: .*holds no ImageSets/Segmentation or .*VOC 2012 page", capsys.readouterr().err)
    with pytest.raises(FolderError, match=r"holds no leftImg8bit/val"):
        open_benchmark(Data(name="cityscapes19", root=str(tmp_path)), SIDE)
