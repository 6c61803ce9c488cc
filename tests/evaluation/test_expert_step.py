"""A checkpoint may say at which noise level its masks are best."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import seg4diff_jax as s4d
from seg4diff_jax.convert.errors import CheckpointError
from tests.reference.inputs import BLOCK, NAMES, SIZE, an_image
from tests.reference.random_weights import relative_error

IMAGE = an_image(*SIZE)


def test_the_checkpoints_own_noise_level_is_the_default(sd3_checkpoint, tmp_path):
    checkpoint = shutil.copytree(sd3_checkpoint, tmp_path / "sd3")
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    (checkpoint / "transformer" / "config.json").write_text(json.dumps(config | {"expert_step": 5}))
    pipe = s4d.load(checkpoint)
    by_default, named, papers = (
        pipe.segment(IMAGE, NAMES, block=BLOCK, **step) for step in ({}, {"step": 5}, {"step": 8})
    )
    np.testing.assert_array_equal(by_default.scores, named.scores)
    assert relative_error(by_default.scores, papers.scores) > 1e-3
    assert s4d.load(sd3_checkpoint).expert_step == 8


@pytest.mark.parametrize("step", [0, 29, "8", None])
def test_a_noise_level_that_does_not_exist_is_refused_on_loading(sd3_checkpoint, tmp_path, step):
    checkpoint = shutil.copytree(sd3_checkpoint, tmp_path / "sd3")
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    (checkpoint / "transformer" / "config.json").write_text(json.dumps(config | {"expert_step": step}))
    with pytest.raises(CheckpointError, match=f"expert_step is {step!r}; expected an integer from 1 to 28"):
        s4d.load(checkpoint)
