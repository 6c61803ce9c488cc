"""Average precision of an object's map is scikit-learn's, taken as the published code takes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from seg4diff_jax.evaluation.background import above_mean
from seg4diff_jax.segmentation.average_precision import average_precision, object_precision

SIZE, CANVAS = (14, 11), (16, 16)


def published(scores: np.ndarray, foreground: np.ndarray, counted: np.ndarray) -> float:
    """Chefer et al.'s steps: least and greatest, both channels, not-a-number to 0, scikit-learn's average precision."""
    found = torch.from_numpy(scores)
    own = (found - found.min()) / (found.max() - found.min())
    channels = torch.nan_to_num(torch.stack([1 - own, own]), nan=0.0).numpy()
    truth = np.stack([~foreground, foreground])
    both = np.stack([counted, counted])
    return float(np.nan_to_num(average_precision_score(truth[both], channels[both])))


def on_canvas(array: np.ndarray, fill: float) -> jax.Array:
    return jnp.asarray(np.pad(array, [(0, c - s) for c, s in zip(CANVAS, SIZE, strict=True)], constant_values=fill))


def test_a_square_of_many_pixels_loses_nothing_by_rounding():
    draw = np.random.default_rng(7)
    side = 224
    labels = (draw.random((side, side)) < 0.7).astype(np.uint8)
    scores = (draw.random((side, side)) ** 4 + (labels == 0) * 0.2).astype(np.float32)
    found = object_precision(jnp.asarray(scores), jnp.asarray(labels), jnp.array([side, side]), 0)
    assert float(found) == pytest.approx(published(scores, labels == 0, labels != 255), abs=5e-7)


def ours(scores: np.ndarray, labels: np.ndarray) -> float:
    found = jax.jit(object_precision, static_argnums=3)
    return float(found(on_canvas(scores, 9.0), on_canvas(labels, 255), jnp.array(SIZE), 0))


@pytest.mark.parametrize("levels", [None, 2, 5, 40])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_it_is_what_the_published_code_computes(levels, ignored):
    draw = np.random.default_rng(levels or 0)
    for _ in range(10):
        scores = draw.random(SIZE).astype(np.float32) * 0.02 + 0.01
        if levels:  # many pixels are equal, as where a coarse map is enlarged
            scores = np.round(scores * 50 * levels).astype(np.float32) / levels
        labels = np.where(draw.random(SIZE) < 0.3 + scores.mean(), 0, 1)
        labels = np.where(draw.random(SIZE) < ignored, 255, labels).astype(np.uint8)
        expected = published(scores, labels == 0, labels != 255)
        assert ours(scores, labels) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_map_that_is_the_same_everywhere_is_right_half_of_the_time_as_in_the_published_code(share):
    labels = (np.random.default_rng(1).random(SIZE) >= share).astype(np.uint8)
    scores = np.full(SIZE, 0.25, np.float32)
    assert ours(scores, labels) == published(scores, labels == 0, labels != 255) == 0.5


def test_a_map_that_is_the_mask_is_perfect_and_its_opposite_is_worst():
    labels = (np.random.default_rng(1).random(SIZE) < 0.6).astype(np.uint8)
    assert ours((labels == 0).astype(np.float32), labels) == 1
    assert ours((labels == 1).astype(np.float32), labels) == 0.5
    everywhere = np.zeros(SIZE, np.uint8)
    scores = np.random.default_rng(2).random(SIZE).astype(np.float32)
    assert ours(scores, everywhere) == pytest.approx(published(scores, everywhere == 0, everywhere != 255), abs=1e-6)


def test_an_image_without_a_labelled_pixel_has_none():
    assert ours(np.random.default_rng(0).random(SIZE).astype(np.float32), np.full(SIZE, 255, np.uint8)) == 0


def test_cases_that_are_not_counted_do_not_matter():
    draw = np.random.default_rng(3)
    for cases in (1, 2, 50):
        scores = np.round(draw.random(cases), 1).astype(np.float32)
        counted = draw.random(cases) < 0.7
        positive = counted & (draw.random(cases) < 0.5)
        expected = average_precision_score(positive[counted], scores[counted]) if positive.any() else 0
        found = average_precision(jnp.asarray(scores), jnp.asarray(positive), jnp.asarray(counted))
        assert float(found) == pytest.approx(expected, abs=1e-6)


def test_the_object_is_where_its_map_is_above_its_mean():
    scores = np.random.default_rng(4).random(SIZE).astype(np.float32)
    found = above_mean(on_canvas(scores, 9.0), jnp.array(SIZE))[: SIZE[0], : SIZE[1]]
    np.testing.assert_array_equal(found, scores > scores.mean())
    assert not above_mean(jnp.full(CANVAS, 0.25), jnp.array(SIZE)).any()
