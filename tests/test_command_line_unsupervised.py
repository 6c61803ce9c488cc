"""`seg4diff segment-unsupervised` and `seg4diff merge-threshold`: what they write and print, and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.analysis.merge_threshold import THRESHOLDS, at_thresholds, unsupervised_scores
from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.command_line import main, merge_threshold
from seg4diff_jax.data.folder import LabelledFolder
from seg4diff_jax.evaluation.options import thresholds
from seg4diff_jax.segmentation.unsupervised_scores import PROTOCOLS
from tests.reference.inputs import SQUARE, VARIED, an_image
from tests.reference.ties import assert_same_labels


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "picture.png"
    Image.fromarray(an_image(90, 120)).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    for name in ("images", "labels"):
        (root / name).mkdir()
    for number in range(2):
        Image.fromarray(an_image(SQUARE, SQUARE, number)).save(root / "images" / f"{number}.png")
        labels = np.kron([[number, 1], [2, 255]], np.ones((SQUARE // 2, SQUARE // 2))).astype(np.uint8)
        Image.fromarray(labels).save(root / "labels" / f"{number}.png")
    (root / "classes.txt").write_text("cat\ndog\nsky\n")
    return root


def test_segments_are_written_as_classes_are_under_names_that_say_nothing(sd3, sd3_checkpoint, image, tmp_path):
    out = tmp_path / "out"
    named = ["--block", str(VARIED), "--step", "10", "--seed", "3", "--size", "64x96", "--threshold", "0.02"]
    arguments = ["segment-unsupervised", str(image), *named, "--model", str(sd3_checkpoint), "--out", str(out)]
    assert main(arguments) == 0
    expected = sd3.segment_unsupervised(image, block=VARIED, step=10, seed=3, size=(64, 96), threshold=0.02)
    assert 1 < expected.segments < 77
    assert_same_labels(np.asarray(Image.open(out / "labels.png")), expected.labels, expected.maps)
    names = [f"segment {number}" for number in range(1, expected.segments + 1)]
    with np.load(out / "scores.npz") as saved:
        np.testing.assert_allclose(saved["scores"], expected.maps, rtol=1e-5)
        assert saved["classes"].tolist() == names
    record = json.loads((out / "segmentation.json").read_text())
    assert [entry["name"] for entry in record["classes"]] == names
    assert (record["prompts"], record["threshold"], record["minmax"]) == ([""], 0.02, "pixel")
    assert (out / "overlay.png").is_file()
    assert len(list((out / "heatmaps").iterdir())) == expected.segments


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--threshold", "0"], "threshold is 0.0; expected a number above 0"),
        (["--threshold=-0.1"], "threshold is -0.1; expected a number above 0"),
        (["--block", "6"], "block is 6; "),
        (["--size", "64x90"], "multiples of 16"),
    ],
)
def test_what_cannot_be_segmented_is_told_before_weights_are_read(
    sd3_checkpoint, image, tmp_path, capsys, monkeypatch, changed, message
):
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: pytest.fail("weights were read"))
    out = ["--out", str(tmp_path / "out")]
    named = ["--model", str(sd3_checkpoint), "--block", "0", *out, *changed]
    assert main(["segment-unsupervised", str(image), *named]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_table_has_the_score_of_each_threshold_and_marks_the_best(sd3, sd3_checkpoint, folder, capsys):
    named = ["--thresholds", "0.004,0.02,1", "--block", str(VARIED), "--batch-size", "2", "--seed", "1"]
    assert main(["merge-threshold", str(folder), *named, "--model", str(sd3_checkpoint)]) == 0
    table = capsys.readouterr().out
    protocols = at_thresholds(PROTOCOLS["ours"], (0.004, 0.02, 1.0))
    options = {"block": VARIED, "seed": 1, "batch_size": 2}
    expected = unsupervised_scores(sd3, LabelledFolder(folder), 3, protocols, **options)
    rows = re.findall(r"^ *([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)( +best)?", table, re.MULTILINE)
    assert [float(row[0]) for row in rows] == [0.004, 0.02, 1]
    for row, score in zip(rows, expected, strict=True):
        assert float(row[1]) == pytest.approx(100 * score.counts.mean_iou(), abs=0.006)
        assert float(row[2]) == pytest.approx(100 * score.counts.pixel_accuracy(), abs=0.006)
        assert float(row[3]) == pytest.approx(score.segments, abs=0.051)
    best = max(expected, key=lambda score: score.counts.mean_iou()).protocol.threshold
    assert [float(row[0]) for row in rows if row[4]] == [best]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--thresholds", "0.1,x"], "--thresholds is '0.1,x': expected numbers above 0"),
        (["--thresholds", "0.1,0.1"], "each once"),
        (["--thresholds", "0"], "expected numbers above 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--step", "29"], "step is 29"),
        (["--block", "6"], "block is 6; "),
    ],
)
def test_what_cannot_be_scored_is_told_before_weights_are_read(
    sd3_checkpoint, folder, capsys, monkeypatch, changed, message
):
    monkeypatch.setattr(merge_threshold, "load_shown", lambda *_, **__: pytest.fail("weights were read"))
    assert main(["merge-threshold", str(folder), "--model", str(sd3_checkpoint), "--block", "0", *changed]) == 1
    assert message in capsys.readouterr().err


def test_without_a_list_many_thresholds_are_tried(sd3_checkpoint, folder, capsys):
    assert main(["merge-threshold", str(folder), "--block", "0", "--model", str(sd3_checkpoint)]) == 0
    rows = re.findall(r"^ *([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+", capsys.readouterr().out, re.MULTILINE)
    assert tuple(float(row) for row in rows) == THRESHOLDS


def test_lists_of_thresholds_are_read_as_they_are_written():
    for value in ("0.5, 0.25", [0.5, 0.25]):
        assert thresholds(value, "--thresholds") == (0.5, 0.25)
    assert thresholds(0.5, "--thresholds") == (0.5,)
