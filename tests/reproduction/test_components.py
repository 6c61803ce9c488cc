"""What explains the variance of principal components: closed forms, and NumPy's analysis of variance written out."""

from __future__ import annotations

import numpy as np
import pytest

from seg4diff_jax.reproduction.components import at_tokens, of_labels, of_positions
from seg4diff_jax.segmentation.metrics import IGNORED

GRID = (6, 5)
LABELS = np.random.default_rng(0).integers(0, 4, GRID[0] * GRID[1])


def test_scores_that_are_a_function_of_the_label_are_explained_by_it_wholly():
    scores = np.random.default_rng(1).standard_normal((2, 4, 3))[:, LABELS]
    assert of_labels(scores, LABELS) == pytest.approx(1)
    assert of_labels(scores, np.zeros_like(LABELS)) == pytest.approx(0, abs=1e-12)


def test_of_other_scores_the_part_between_the_labels_means_is_explained():
    scores = np.random.default_rng(2).standard_normal((2, LABELS.size, 3))
    means = np.stack([scores[:, label == LABELS].mean(axis=1) for label in range(4)], axis=1)[:, LABELS]
    whole = np.square(scores - scores.mean(axis=1, keepdims=True)).sum()
    expected = np.square(means - scores.mean(axis=1, keepdims=True)).sum() / whole
    assert of_labels(scores, LABELS) == pytest.approx(expected)


def test_void_tokens_do_not_count():
    scores = np.random.default_rng(3).standard_normal((1, LABELS.size, 3))
    labels = np.where(np.arange(LABELS.size) < 7, IGNORED, LABELS)
    assert of_labels(scores, labels) == pytest.approx(of_labels(scores[:, 7:], LABELS[7:]))
    noise = np.where((labels == IGNORED)[:, None], 100.0, scores)  # of tokens that do not count
    assert of_positions(noise, GRID, labels) == pytest.approx(of_positions(scores, GRID, labels))


def test_quadratic_functions_of_the_position_are_explained_wholly_and_others_in_part():
    rows, columns = np.meshgrid(np.arange(GRID[0]), np.arange(GRID[1]), indexing="ij")
    quadratic = (1 + rows - 2 * columns + 0.5 * rows * columns + columns**2).reshape(1, -1, 1).astype(float)
    assert of_positions(quadratic, GRID, LABELS) == pytest.approx(1)
    checkers = ((rows + columns) % 2).reshape(1, -1, 1).astype(float)
    assert of_positions(checkers, GRID, LABELS) < 0.1


def test_a_token_has_the_label_in_the_middle_of_its_patch():
    labels = np.arange(12 * 20).reshape(12, 20) % 251
    np.testing.assert_array_equal(at_tokens(labels, (3, 5)), labels[2::4, 2::4].ravel())
