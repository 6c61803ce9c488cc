"""The highest pixel of a class's map lies on the class or not: as PyTorch upsamples, pixel by pixel."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from seg4diff_jax.segmentation.pointing import pointing_accuracy, pointing_counts
from tests.reference.further_metrics import pointing

CLASSES = 6
counted = jax.jit(partial(pointing_counts, classes=CLASSES))


def test_points_are_those_of_maps_that_are_upsampled_whole():
    draw, hits = np.random.default_rng(0), 0
    for height, width in ((30, 40), (47, 21), (9, 48), (48, 48)):
        scores = draw.random((8, 4, 6)).astype(np.float32)
        class_of_row = np.array([0, 2, 3, 5, 1, 255, 255, 255])
        truth = np.full((48, 48), 255, np.uint8)
        truth[:height, :width] = draw.choice([0, 1, 2, 3, 255], (height, width), p=[0.3, 0.2, 0.3, 0.1, 0.1])
        found = np.asarray(counted(scores, truth, np.array([height, width]), class_of_row))
        np.testing.assert_array_equal(found, pointing(scores, truth[:height, :width], class_of_row, CLASSES))
        assert found[1, 5] == 0, "the image does not have it"
        hits += found[0].sum()
    assert hits > 0


def test_a_point_on_a_pixel_without_a_label_is_no_try_and_of_equals_the_first_counts():
    flat = np.ones((1, 2, 2), np.float32)
    truth = np.array([[1, 0], [0, 0]], np.uint8)
    size, own = np.array([2, 2]), np.array([0])
    assert np.asarray(counted(flat, truth, size, own))[:, 0].tolist() == [0, 1]
    truth[0, 0] = 255
    assert np.asarray(counted(flat, truth, size, own))[:, 0].tolist() == [0, 0]
    truth[0, 0] = 0
    assert np.asarray(counted(flat, truth, size, own))[:, 0].tolist() == [1, 1]


def test_a_token_on_an_edge_points_to_its_first_pixel_whatever_rounding_prefers():
    scores = np.full((1, 4, 4), 0.1, np.float32)
    scores[0, 3, 3] = 0.7
    size, own = np.array([32, 32]), np.array([0])
    outside_the_centre = np.arange(32) >= 28
    for row, column in np.argwhere(np.ones((32, 32), bool) & outside_the_centre[:, None] & outside_the_centre):
        truth = np.ones((32, 32), np.uint8)
        truth[row, column] = 0
        assert np.asarray(counted(scores, truth, size, own))[:, 0].tolist() == [int((row, column) == (28, 28)), 1]


def test_accuracy_is_of_tries():
    np.testing.assert_array_equal(pointing_accuracy(np.array([[3, 0, 0], [4, 2, 0]])), [0.75, 0, np.nan])
