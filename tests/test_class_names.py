"""What a user is told of class names that do what few mean."""

from __future__ import annotations

import shlex
import warnings

import numpy as np
import pytest
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.class_names import OneClassWarning, one_class, with_commas
from seg4diff_jax.command_line import main

PIXELS = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def pipe(sd3_checkpoint) -> s4d.Pipeline:
    return s4d.load(sd3_checkpoint, blocks=4)


def test_one_class_takes_every_pixel_and_is_warned_of_once_a_call(pipe):
    with pytest.warns(OneClassWarning, match="'cat' is the only class, so every pixel is given to it") as said:
        result = pipe.segment(PIXELS, ["cat"], block=3)
    assert not result.labels.any()
    assert len(said) == 1
    with pytest.warns(OneClassWarning) as said:
        pipe.segment([PIXELS] * 3, [["cat"], ["cat"], ["cat", "sky"]], block=3)
    assert len(said) == 1


def test_several_classes_are_not_warned_of(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error", OneClassWarning)
        pipe.segment(PIXELS, ["cat", "sky"], block=3)
    assert one_class(["cat", "sky"]) is None
    assert with_commas(["cat", "traffic light"]) is None


def test_names_with_a_comma_are_shown_as_the_words_they_should_be():
    said = with_commas(["ball,traffic light, cone"])
    assert said is not None
    words = said.split("separate words: ")[1].split(";")[0]
    assert shlex.split(words) == ["ball", "traffic light", "cone"]
    assert with_commas([","]) is not None


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (["fish"], ["'fish' is the only class"]),
        (["ball,cone"], ["Names are separate words: ball cone;"]),
        (["ball,", "cone,", "sky"], ["Names are separate words: ball cone sky;"]),
        (["ball", "sky"], []),
    ],
)
def test_the_command_warns_before_anything_is_loaded_and_once(classes, told, sd3_checkpoint, tmp_path, capsys):
    picture = tmp_path / "photo.png"
    Image.fromarray(PIXELS).save(picture)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OneClassWarning)
        options = ["--model", str(sd3_checkpoint), "--block", "3", "--out", str(tmp_path / "out")]
        assert main(["segment", str(picture), *classes, *options]) == 0
    lines = capsys.readouterr().err.splitlines()
    warned = [line for line in lines if line.startswith("warning: ")]
    assert len(warned) == len(told)
    assert all(part in line for part, line in zip(told, warned, strict=True))
    assert lines[: len(warned)] == warned
