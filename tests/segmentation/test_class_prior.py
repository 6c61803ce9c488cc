"""The mean attention to each class's words over pictures divides its maps: against scores one by one, and by NumPy."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import seg4diff_jax as s4d
from seg4diff_jax.class_priors import measure_class_prior, read_class_prior, write_class_prior
from seg4diff_jax.segmentation.class_prior import ClassPrior, divided_by_prior
from seg4diff_jax.segmentation.mask_options import MaskOptions
from tests.reference.inputs import NAMES, SIZE, VARIED, an_image

PRIOR = ClassPrior({"left": 0.2, "right": 0.05}, block=VARIED, step=8, pictures=3)
OF_2 = ClassPrior({"left": 0.1}, block=2, step=8, pictures=1)
KEPT = {"model": "m", "block": VARIED, "step": 8, "pictures": 3, "means": {"left": 0.2, "right": 0.05}}


def test_the_prior_is_the_mean_of_the_papers_class_scores_over_pictures(sd3):
    """Of pictures of two sizes, in batches of which one holds both; noise is by the picture's place among all."""
    sizes = [SIZE, SIZE[::-1], SIZE]
    pictures, done = [an_image(*size, seed=number) for number, size in enumerate(sizes)], []
    asked = {"block": VARIED, "step": 5, "seed": 3}
    prior = measure_class_prior(sd3, pictures, NAMES, **asked, batch_size=2, on_progress=done.append)
    scores = [each.scores for each in sd3.segment(pictures, NAMES, **asked)]
    expected = np.mean([score.mean(axis=(1, 2)) for score in scores], axis=0)
    np.testing.assert_allclose(prior.of(NAMES), expected, rtol=1e-5)
    assert (prior.block, prior.step, prior.pictures, done) == (VARIED, 5, 3, [2, 3])


def test_each_map_is_divided_by_its_prior_to_the_power():
    averaging = np.random.default_rng(0).random((2, 3, 5)).astype(np.float32)
    prior = np.array([[0.2, 0.05, 1.0], [0.2, 0.05, 1.0]], np.float32)
    found = divided_by_prior(averaging, prior, 0.4)
    np.testing.assert_allclose(found, averaging / prior[:, :, None] ** 0.4, rtol=1e-6)
    np.testing.assert_array_equal(divided_by_prior(averaging, prior, 0.0), averaging)


@pytest.mark.parametrize("views", [1, 2])
def test_segment_divides_scores_by_the_prior(sd3, views):
    """Each image by its own classes; the order in which classes are asked for does not matter."""
    images, lists = [an_image(*SIZE), an_image(*SIZE, seed=1)], [NAMES, NAMES[:2]]
    prior = ClassPrior({name: 0.01 * number for number, name in enumerate(NAMES[::-1], 1)}, VARIED, 8, 1)
    ask = {"block": VARIED, "size": SIZE}
    plain = sd3.segment(images, lists, **ask, masks=MaskOptions(views=views))
    found = sd3.segment(images, lists, **ask, masks=MaskOptions(views=views, prior=0.7), prior=prior)
    for one, other, names in zip(found, plain, lists, strict=True):
        expected = other.scores / prior.of(names)[:, None, None] ** 0.7
        np.testing.assert_allclose(one.scores, expected, rtol=1e-5)
        assert (one.labels != other.labels).any()


def test_a_file_keeps_a_prior(tmp_path):
    write_class_prior(tmp_path / "new" / "prior.json", PRIOR, "m")
    assert json.loads((tmp_path / "new" / "prior.json").read_text()) == KEPT
    assert read_class_prior(tmp_path / "new" / "prior.json") == PRIOR
    assert read_class_prior(str(tmp_path / "new" / "prior.json")) == PRIOR


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"means": None}, "means is None; expected what `seg4diff class-prior` wrote"),
        ({"means": {}}, "means is empty; expected the mean attention to at least one class; expected what"),
        ({"means": {"left": "0.2"}}, "the mean of 'left' is '0.2'; expected what"),
        ({"means": {"left": True}}, "the mean of 'left' is True; expected what"),
        ({"means": {"left": 0.0}}, "means has 0.0 for 'left'; expected a number above 0 and at most 1; expected"),
        ({"means": {"left": 1.5}}, "means has 1.5 for 'left'; expected a number above 0 and at most 1; expected"),
        ({"block": "3"}, "block is '3'; expected what"),
        ({"step": 0}, "step is 0; expected at least 1; expected what"),
        ({"pictures": True}, "pictures is True; expected what"),
    ],
)
def test_a_file_that_holds_no_prior_is_refused(tmp_path, changed, message):
    file = tmp_path / "prior.json"
    file.write_text(json.dumps(KEPT | changed))
    with pytest.raises(s4d.CheckpointError, match="^" + re.escape(f"{file}: {message}")):
        read_class_prior(file)


@pytest.mark.parametrize(
    ("masks", "prior", "message"),
    [
        (MaskOptions(prior=0.4), None, "prior is 0.4, the power of a class prior, and none is given"),
        (None, PRIOR, "a class prior is given, but its power, prior, is 0; expected more than 0, such as 0.4"),
        (
            MaskOptions(prior=0.4),
            ClassPrior({"a": 0.1}, 2, 8, 1),
            f"the class prior is block 2's, and block {VARIED} is read",
        ),
        (
            MaskOptions(prior=0.4),
            PRIOR,
            f"the class prior has no mean of '{NAMES[0]}', '{NAMES[1]}', '{NAMES[2]}'; it was measured for 2 classes, "
            "such as 'left', 'right': measure it for all that are asked for",
        ),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(sd3, masks, prior, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sd3.segment(an_image(*SIZE), NAMES, block=VARIED, size=SIZE, masks=masks, prior=prior)


def test_no_picture_gives_no_prior(sd3):
    with pytest.raises(ValueError, match="expected at least one picture to measure the class prior on, found none"):
        measure_class_prior(sd3, [], NAMES, block=VARIED)
