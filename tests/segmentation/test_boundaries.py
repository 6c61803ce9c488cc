"""Bands along the edges of masks are what SciPy's erosion takes away, class by class; and their IoU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seg4diff_jax.segmentation.boundaries import band_widths, boundary_counts, boundary_iou
from tests.reference.further_metrics import boundary

CLASSES, CANVAS = 5, (40, 48)
SIZES = np.array([(40, 48), (31, 20), (12, 45), (3, 2)])
counted = jax.jit(jax.vmap(partial(boundary_counts, classes=CLASSES)))


def label_maps(seed: int) -> np.ndarray:
    """Cells of classes, on a canvas with noise past each image's size."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, CLASSES, (len(SIZES), 8, 8))
    return coarse.repeat(5, axis=1).repeat(6, axis=2)


@pytest.mark.parametrize("widths", [(1, 1, 1, 1), (2, 3, 4, 1), (9, 1, 6, 2)])
def test_bands_are_what_an_erosion_takes_away(widths):
    truth, predicted = label_maps(0).astype(np.uint8), label_maps(1)
    draw = np.random.default_rng(2)
    truth[draw.random(truth.shape) < 0.01] = 255
    found = np.asarray(counted(truth, predicted, SIZES, np.array(widths)))
    for image, (height, across) in enumerate(SIZES):
        own = np.s_[image, :height, :across]
        np.testing.assert_array_equal(found[image], boundary(truth[own], predicted[own], widths[image], CLASSES))
    assert found[0, 0].sum() > 0


def test_a_wide_band_is_the_whole_mask_and_its_iou_that_of_masks():
    truth, predicted = label_maps(3).astype(np.uint8)[:1], label_maps(4)[:1]
    (found,) = np.asarray(counted(truth, predicted, SIZES[:1], np.array([60])))
    masks = [(truth == label, predicted == label) for label in range(CLASSES)]
    expected = [(true & own).sum() / (true | own).sum() if true.any() else np.nan for true, own in masks]
    np.testing.assert_allclose(boundary_iou(found), expected, rtol=1e-12)


def test_a_hole_adds_the_ring_around_it_and_a_moved_mask_loses_more_than_in_iou():
    truth = np.zeros((1, *CANVAS), np.uint8)
    truth[0, 10:30, 10:40] = 1
    inside, moved = truth.astype(np.int64), truth.astype(np.int64)
    inside[0, 18:22, 20:28] = 2
    moved = np.roll(moved, 2, axis=2)
    size, width = SIZES[:1], np.array([2])
    of = lambda predicted: boundary_iou(np.asarray(counted(truth, predicted, size, width))[0])
    frame, ring = 20 * 30 - 16 * 26, 8 * 12 - 4 * 8
    assert of(inside)[1] == frame / (frame + ring)
    assert of(moved)[1] < (28 * 20) / (32 * 20) - 0.2


def test_classes_that_are_not_there_have_no_boundary_iou():
    found = boundary_iou(np.array([[5, 0, 0], [10, 0, 4], [5, 7, 0]]))
    np.testing.assert_array_equal(found, [0.5, np.nan, 0])


def test_bands_are_two_hundredths_of_the_diagonal_and_at_least_a_pixel():
    sizes = np.array([(300, 400), (10, 10), (64, 64), (1024, 2048)])
    assert band_widths(sizes).tolist() == [10, 1, 2, 46]


def test_one_program_serves_all_widths_and_sizes():
    before = counted._cache_size()
    for width in (1, 5):
        counted(label_maps(5).astype(np.uint8), label_maps(6), SIZES - 1, jnp.full(4, width).__array__())
    assert counted._cache_size() == before
