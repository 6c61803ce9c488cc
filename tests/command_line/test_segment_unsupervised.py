"""`seg4diff segment-unsupervised`: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.command_line import main
from tests.reference.inputs import VARIED, an_image
from tests.reference.ties import assert_same_labels


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "picture.png"
    Image.fromarray(an_image(90, 120)).save(path)
    return path


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
    assert record["grouping"] == "pads"
    assert (out / "overlay.png").is_file()
    assert len(list((out / "heatmaps").iterdir())) == expected.segments


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--threshold", "0"], "threshold is 0.0; expected a number above 0"),
        (["--grouping", "diffcut", "--threshold", "2"], "threshold is 2.0; expected below 1, such as 0.35"),
        (["--grouping", "diffcut", "--minmax", "token"], "minmax is 'token', which is of the grouping pads alone"),
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
