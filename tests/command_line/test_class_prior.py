"""`seg4diff class-prior` at the terminal: the file that it writes, and what `segment --prior` does with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.command_line import main
from seg4diff_jax.segmentation.mask_options import MASKS_WITH_PRIOR
from tests.reference.inputs import an_image

CLASSES = ["ball", "sky", "wood"]
HOW = ["--model", "miniature", "--dtype", "float32"]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Three pictures, a hidden file beside them, and the names of three classes."""
    root = tmp_path_factory.mktemp("given")
    (root / "pictures").mkdir()
    for number in range(3):
        Image.fromarray(an_image(64, 64, number)).save(root / "pictures" / f"{number}.png")
    (root / "pictures" / ".hidden").write_bytes(b"no picture")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture(scope="module")
def written(given) -> Path:
    asked = [str(given / "pictures"), str(given / "classes.txt"), "--out", str(given / "prior.json"), "--seed", "2"]
    assert main(["class-prior", *asked, "--count", "2", *HOW]) == 0
    return given / "prior.json"


def test_the_file_holds_what_was_measured_on_the_first_pictures(given, written):
    pipe = s4d.load("miniature", dtype="float32")
    pictures = [str(given / "pictures" / f"{number}.png") for number in range(2)]
    expected = s4d.measure_class_prior(pipe, pictures, CLASSES, seed=2)
    found = s4d.read_class_prior(written)
    np.testing.assert_allclose(found.of(CLASSES), expected.of(CLASSES), rtol=1e-5)
    assert (found.block, found.step, found.pictures) == (pipe.expert_block, pipe.expert_step, 2)
    assert json.loads(written.read_text())["model"] == "miniature"


def test_segment_divides_by_it(given, written, tmp_path):
    image, out = str(given / "pictures" / "0.png"), tmp_path / "out"
    asked = ["--refine", "--explain", "--concepts", "--prior", str(written), "--out", str(out)]
    assert main(["segment", image, *CLASSES, *HOW, *asked]) == 0
    pipe = s4d.load("miniature", dtype="float32")
    prior = s4d.read_class_prior(written)
    masks = replace(MASKS_WITH_PRIOR, reading="concepts")
    expected = pipe.segment(image, CLASSES, masks=masks, prior=prior)
    with np.load(out / "scores.npz") as saved:
        np.testing.assert_allclose(saved["scores"], expected.scores, rtol=1e-4)
    record = json.loads((out / "segmentation.json").read_text())
    assert (record["masks"]["prior"], record["masks"]["reading"]) == (MASKS_WITH_PRIOR.prior, "concepts")
    assert record["prior"] == str(written)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["absent", "--overwrite"], "absent: no such directory; expected one of pictures"),
        ([""], "--out prior.json is there: name another, or give --overwrite"),
        (["", "--overwrite", "--count", "0"], "--count is 0: expected at least 1"),
        (["", "--overwrite", "--batch", "0"], "--batch is 0: expected at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_weights_are_read(
    given, written, changed, message, monkeypatch, capsys
):
    monkeypatch.chdir(given)
    directory, *more = changed
    asked = [directory or "pictures", "classes.txt", "--out", written.name, *more, *HOW]
    assert main(["class-prior", *asked]) == 1
    said = capsys.readouterr().err
    assert f"error: {message}" in said.replace("\n", " ")
    assert "loading" not in said


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["ball", "sky"], "--prior is for --refine, which is not given"),
        (["ball", "moon", "--refine"], "the class prior has no mean of 'moon'; it was measured for 3 classes"),
    ],
)
def test_a_prior_that_segment_cannot_use_is_refused(given, written, asked, message, capsys):
    assert main(["segment", str(given / "pictures" / "0.png"), *asked, *HOW, "--prior", str(written)]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_an_empty_directory_has_no_pictures(tmp_path, given, capsys):
    (tmp_path / "none").mkdir()
    asked = [str(tmp_path / "none"), str(given / "classes.txt"), "--out", str(tmp_path / "prior.json")]
    assert main(["class-prior", *asked, *HOW]) == 1
    assert "holds no file: expected pictures" in capsys.readouterr().err.replace("\n", " ")
