"""Confusion matrices and what is read from them, against counting pixel by pixel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, jaccard_score, recall_score
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from seg4diff_jax.segmentation.metrics import (
    IGNORED,
    accuracy_per_class,
    confusion_matrix,
    iou_per_class,
    mean_iou,
    pixel_accuracy,
)
from seg4diff_jax.segmentation.unsupervised_scores import MatchCounts

CLASSES = 5


def make_maps(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted labels; class 3 is predicted but never true, class 4 neither."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, IGNORED], (3, 7, 5)).astype(np.uint8)
    return truth, rng.integers(0, 4, truth.shape)


def test_a_confusion_matrix_counts_every_pixel_that_is_not_ignored():
    truth, predicted = make_maps()
    expected = np.zeros((CLASSES, CLASSES), int)
    for true, guess in zip(truth.ravel(), predicted.ravel(), strict=True):
        if true != IGNORED:
            expected[true, guess] += 1
    found = jax.jit(confusion_matrix, static_argnums=2)(jnp.asarray(truth), jnp.asarray(predicted), CLASSES)
    np.testing.assert_array_equal(found, expected)


def test_iou_is_intersection_over_union_and_the_mean_is_over_classes_that_occur():
    truth, predicted = make_maps(1)
    kept = truth != IGNORED
    confusion = np.asarray(confusion_matrix(jnp.asarray(truth), jnp.asarray(predicted), CLASSES))
    expected = []
    for c in range(3):
        true, guess = (truth == c) & kept, (predicted == c) & kept
        expected.append((true & guess).sum() / (true | guess).sum())
    np.testing.assert_allclose(iou_per_class(confusion), [*expected, np.nan, np.nan])
    assert mean_iou(confusion) == pytest.approx(np.mean(expected))
    assert mean_iou(confusion, [1, 2, 4]) == pytest.approx(np.mean(expected[1:]))
    assert np.isnan(mean_iou(confusion, [4]))
    assert pixel_accuracy(confusion) == pytest.approx((truth == predicted)[kept].mean())


def test_scores_are_scikit_learns_on_random_labels_with_ignored_pixels():
    truth, predicted = make_maps(2)
    kept = truth != IGNORED
    found = np.asarray(confusion_matrix(jnp.asarray(truth), jnp.asarray(predicted), CLASSES))
    pairs = truth[kept], predicted[kept]
    np.testing.assert_array_equal(found, sklearn_confusion_matrix(*pairs, labels=range(CLASSES)))
    present = np.unique(truth[kept])
    assert mean_iou(found) == pytest.approx(jaccard_score(*pairs, labels=present, average="macro"))
    np.testing.assert_allclose(iou_per_class(found)[present], jaccard_score(*pairs, labels=present, average=None))
    assert pixel_accuracy(found) == pytest.approx(accuracy_score(*pairs))


def test_accuracy_by_class_is_scikit_learns_recall_for_matched_segments_too():
    truth, predicted = make_maps(2)
    kept = truth != IGNORED
    confusion = np.asarray(confusion_matrix(jnp.asarray(truth), jnp.asarray(predicted), CLASSES))
    expected = recall_score(truth[kept], predicted[kept], labels=[0, 1, 2], average=None)
    hits = np.diagonal(confusion)
    matched = MatchCounts(hits, confusion.sum(axis=0) - hits, confusion.sum(axis=1) - hits)
    for found in (accuracy_per_class(confusion), matched.accuracy()):
        np.testing.assert_allclose(found[:3], expected)
        assert np.isnan(found[3:]).all(), "predicted, but never true"
