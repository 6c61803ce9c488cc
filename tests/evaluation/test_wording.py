"""Synonyms, templates, stop words and competitors: what is read, what is asked for, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.evaluation.benchmarks import Benchmark, open_benchmark
from seg4diff_jax.evaluation.options import BackgroundOptions, Data, parse
from seg4diff_jax.evaluation.vocabulary import AllClasses, Vocabulary, each_class_once, questions
from seg4diff_jax.evaluation.wording import Words, read_synonyms
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.segmentation.open_vocabulary import upsampled_labels
from seg4diff_jax.text import Wording
from tests.reference.inputs import SQUARE, an_image
from tests.reference.label_files import label, picture, text
from tests.reference.ties import undecided

SIDE = 64
CLASSES = ("cat", "background", "sofa", "grass")
BACKGROUND = CLASSES.index("background")


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with a background class."""
    picture(tmp_path / "set/images/a.png", (8, 8))
    label(tmp_path / "set/labels/a.png", np.repeat([0, 1, 2, 3], 2)[None].repeat(8, axis=0))
    text(tmp_path / "set/classes.txt", CLASSES)
    return tmp_path / "set"


# ---- synonyms -------------------------------------------------------------------------------------------------------


def test_synonyms_are_a_word_or_a_list_of_words_for_each_class(tmp_path):
    file = tmp_path / "synonyms.yaml"
    file.write_text("sofa: [sofa, couch ]\ncat: feline\ntraffic light:\n- signal\n")
    assert read_synonyms(str(file)) == {"sofa": ("sofa", "couch"), "cat": ("feline",), "traffic light": ("signal",)}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", "synonyms.yaml holds None; expected the names of each class, as in `sofa: "),
        ("[sofa, couch]", r"synonyms.yaml holds \['sofa', 'couch'\]; expected the names of each class"),
        ("sofa: []", r"synonyms.yaml: the names of 'sofa' are \[\]; expected"),
        ("sofa: [couch, 3]", r"synonyms.yaml: the names of 'sofa' are \['couch', 3\]; expected .* in quotes"),
        ("sofa: ' '", "synonyms.yaml: the names of 'sofa' are ' '; expected"),
        ("no: door", "synonyms.yaml: the names of False are 'door'; expected .* in quotes"),
        ("sofa: couch\nsofa: settee", "synonyms.yaml: no YAML: 'sofa' occurs twice in one section; expected"),
        ("sofa: [couch", "synonyms.yaml: no YAML: .*; expected the names of each class"),
        ("#" * (2**20 + 1), "synonyms.yaml has 1048577 characters; expected .* in at most 1048576"),
    ],
)
def test_what_are_no_synonyms_is_refused_by_the_files_name(tmp_path, contents, message):
    (tmp_path / "synonyms.yaml").write_text(contents)
    with pytest.raises(FolderError, match=message):
        read_synonyms(str(tmp_path / "synonyms.yaml"))


# ---- what images are asked for --------------------------------------------------------------------------------------


def asked(sd3, benchmark: Benchmark, classes: tuple[int, ...], by_threshold: bool = False):
    rows, prompts = Vocabulary.of(benchmark, sd3.tokenizers, by_threshold=by_threshold).asked(classes)
    return rows, prompts.prompts


def test_background_is_asked_for_by_its_name_or_found_by_what_stands_for_it(sd3):
    named = Benchmark("set", CLASSES, [], background=BACKGROUND)
    found = replace(named, words=Words(competitors=("sky", "wall")))
    assert asked(sd3, named, (0, 1, 3)) == ((0, 1, 3), ("cat background grass",))
    assert asked(sd3, named, (0, 1, 3), by_threshold=True) == ((0, 3, BACKGROUND), ("cat grass",))
    assert asked(sd3, found, (0, 1, 3)) == ((0, 3, BACKGROUND, BACKGROUND), ("cat grass sky wall",))
    assert asked(sd3, found, (0, 1, 3), by_threshold=True) == ((0, 3, *[BACKGROUND] * 3), ("cat grass sky wall",))
    # An image that the oracle knows to hold no background, or nothing else.
    assert asked(sd3, found, (0, 3), by_threshold=True) == ((0, 3), ("cat grass",))
    assert asked(sd3, found, (BACKGROUND,), by_threshold=True) == ((BACKGROUND,), ("background",))


def test_synonyms_stand_in_place_of_a_classs_own_name_in_the_words_of_the_template(sd3):
    words = Words("f", {"sofa": ("couch", "settee")}, Wording("a {}", ("the",)))
    benchmark = Benchmark("set", CLASSES, [], names="own", words=words)
    found = questions(benchmark, sd3.tokenizers, ("all",))["all"]
    assert isinstance(found, AllClasses)
    assert found.rows == tuple(range(len(CLASSES)))
    assert found.prompts.prompts == ("a cat a background a couch a settee a grass the",)
    assert found.prompts.class_of_name == (0, 1, 2, 2, 3)


def test_a_class_of_several_rows_has_the_greatest_score_of_them():
    scores = np.arange(12.0).reshape(4, 1, 3) * np.array([1, -1, 1])
    classes, found = each_class_once((5, 1, 5, 1), scores)
    assert classes == (5, 1)
    np.testing.assert_array_equal(found, [[[6, -1, 8]], [[9, -4, 11]]])


# ---- on the command line --------------------------------------------------------------------------------------------


def test_a_class_asked_for_by_two_names_scores_their_mean(sd3, sd3_checkpoint, tmp_path):
    image, names = an_image(SIDE, SIDE, 3), ["tree", "ship", "sofa"]
    found = sd3.segment(image, names, block=0, step=8, size=(SQUARE, SQUARE))
    scores = np.stack([found.scores[:2].mean(axis=0), found.scores[2]])
    truth = np.tile(np.repeat([0, 1], SIDE // 2), (SIDE, 1))
    truth[undecided(scores, (SIDE, SIDE))] = IGNORED
    root, file = tmp_path / "set", tmp_path / "names.yaml"
    label(root / "labels/a.png", truth)
    (root / "images").mkdir()
    Image.fromarray(image).save(root / "images/a.png")
    text(root / "classes.txt", ("cat", "sofa"))
    file.write_text("cat: [tree, ship]\n")
    options = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", "0", "--steps", "8"]
    options += ["--seeds", "0", "--pictures", "0", "--data.synonyms", str(file), "--out", str(tmp_path / "out")]
    assert main(options) == 0
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    right = (upsampled_labels(scores, (SIDE, SIDE)) == truth)[truth != IGNORED]
    assert row["pixel_accuracy"] == pytest.approx(100 * right.mean(), abs=1e-3)
    assert row["synonyms"] == str(file)
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert parse(["--config", str(tmp_path / "out/config.yaml")]).data == Data(**config["data"])


@pytest.mark.parametrize(
    ("data", "background", "message"),
    [
        ({}, {"competitors": []}, r"--background.competitors is \[\]: expected at least one word, and each once"),
        ({}, {"competitors": ""}, "--background.competitors is '': expected at least one word"),
        ({}, {"competitors": "sky,sky"}, "--background.competitors is 'sky,sky': expected .* each once"),
        (
            {},
            {"competitors": "sky, Grass"},
            "background.competitors has 'Grass', which is a class of set: .*leave it out",
        ),
        ({}, {"threshold": 1.5}, "--background.threshold is 1.5: expected numbers above 0 and below 1"),
        ({}, {"threshold": "0"}, "--background.threshold is '0': expected numbers above 0 and below 1"),
        ({}, {"threshold": "0.1,x"}, "--background.threshold is '0.1,x': expected numbers .* as in 0.01,0.02, or grid"),
        ({"background": "ignored"}, {"threshold": 0.1}, "background.threshold is 0.1, but set's background is ignored"),
        ({"stop_words": " "}, {}, "--data.stop-words is ' ': expected at least one word"),
        ({"template": "photo"}, {}, r"the template is 'photo': expected \{\} in it once"),
        ({"synonyms": "SYNONYMS"}, {}, "names synonyms of 'couch', which set has no class of; expected .* 'cat'"),
        ({"synonyms": "/nowhere"}, {}, "/nowhere: no such file; expected the names of each class"),
        (
            {"name": "scenes", "root": None},
            {"threshold": 0.1},
            "threshold is 0.1, but scenes has no background class; ",
        ),
        (
            {"name": "voc20"},
            {"competitors": "sky"},
            "'sky', but voc20 has no background class; voc21, context60, coco-o",
        ),
    ],
)
def test_words_and_thresholds_that_do_not_fit_are_refused_in_one_sentence(root, tmp_path, data, background, message):
    (tmp_path / "names.yaml").write_text("couch: [sofa]\n")
    data = {"root": str(root), **data}
    data |= {"synonyms": str(tmp_path / "names.yaml")} if data.get("synonyms") == "SYNONYMS" else {}
    with pytest.raises(ValueError, match=message) as raised:
        open_benchmark(Data(**data), SIDE, background=BackgroundOptions(**background))
    assert "\n" not in str(raised.value)


def test_a_folder_has_a_background_where_its_classes_name_one(root):
    benchmark = open_benchmark(Data(root=str(root)), SIDE)
    assert (benchmark.background, benchmark.rule) == (BACKGROUND, "scored"), "as any other class, unless it is said"
    assert open_benchmark(Data(root=str(root), background="ignored"), SIDE).rule == "ignored"
    (root / "classes.txt").write_text("cat\ndog\nsofa\ngrass\n")
    assert open_benchmark(Data(root=str(root)), SIDE).background is None
    with pytest.raises(
        ValueError, match=r"but folder has no background class; .* a folder whose classes.txt names back"
    ):
        open_benchmark(Data(root=str(root)), SIDE, background=BackgroundOptions(competitors="sky"))


def test_options_of_the_background_are_refused_where_nothing_is_asked_for(sd3_checkpoint, root, capsys):
    options = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", "0", "--protocol", "unsupervised"]
    assert main([*options, "--background.threshold", "0.1"]) == 1
    said = "--background.threshold is 0.1, but --protocol is 'unsupervised': add open_vocabulary to it"
    assert said in capsys.readouterr().err
