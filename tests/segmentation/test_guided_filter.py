"""The guided filter, compared with the least squares of every window and with closed forms."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from seg4diff_jax.segmentation.guided_filter import guide, guided, window_mean

HEIGHT, WIDTH, RADIUS, SMOOTHING = 9, 12, 2, 1e-2


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((HEIGHT, WIDTH, 3)).astype(np.float32)


def windows(row: int, column: int, radius: int) -> tuple[slice, slice]:
    return (
        slice(max(0, row - radius), row + radius + 1),
        slice(max(0, column - radius), column + radius + 1),
    )


def by_least_squares(scores: np.ndarray, pixels: np.ndarray, radius: int, smoothing: float) -> np.ndarray:
    """Fits scores as a linear function of the colour in each window by normal equations, in float64."""
    slopes, offsets = np.zeros(pixels.shape), np.zeros(scores.shape)
    for row, column in np.ndindex(scores.shape):
        place = windows(row, column, radius)
        colours, values = pixels[place].reshape(-1, 3).astype(float), scores[place].ravel().astype(float)
        centred = colours - colours.mean(axis=0)
        ridge = centred.T @ centred + smoothing * len(values) * np.eye(3)
        slopes[row, column] = np.linalg.solve(ridge, centred.T @ (values - values.mean()))
        offsets[row, column] = values.mean() - slopes[row, column] @ colours.mean(axis=0)
    filtered = np.zeros(scores.shape)
    for row, column in np.ndindex(scores.shape):
        place = windows(row, column, radius)
        own = slopes[place] @ pixels[row, column].astype(float) + offsets[place]
        filtered[row, column] = own.mean()
    return filtered


@pytest.mark.parametrize("radius", [1, RADIUS, 20])
def test_it_is_the_least_squares_of_every_window(radius):
    pixels, scores = picture(), np.random.default_rng(1).random((HEIGHT, WIDTH)).astype(np.float32)
    found = guided(jnp.asarray(scores), guide(jnp.asarray(pixels), radius, SMOOTHING))
    np.testing.assert_allclose(found, by_least_squares(scores, pixels, radius, SMOOTHING), atol=2e-5)


def test_windows_end_at_the_pictures_edge():
    x = picture()
    inside = np.s_[RADIUS:-RADIUS, RADIUS:-RADIUS]
    found = np.asarray(window_mean(jnp.asarray(x), RADIUS))
    size = 2 * RADIUS + 1
    np.testing.assert_allclose(found[inside], uniform_filter(x, (size, size, 0))[inside], atol=1e-6)
    np.testing.assert_allclose(found[0, 0], x[: RADIUS + 1, : RADIUS + 1].mean(axis=(0, 1)), atol=1e-6)


def test_a_linear_function_of_the_colour_stays_as_it_is():
    pixels = picture()
    scores = pixels @ np.array([0.5, -1.0, 2.0], np.float32) + 3
    found = guided(jnp.asarray(scores), guide(jnp.asarray(pixels), RADIUS, 1e-7))
    np.testing.assert_allclose(found, scores, atol=1e-3)


def test_in_a_picture_without_edges_it_averages_windows_twice():
    scores = np.random.default_rng(1).random((HEIGHT, WIDTH)).astype(np.float32)
    found = guided(jnp.asarray(scores), guide(jnp.full((HEIGHT, WIDTH, 3), 0.5), RADIUS, 1e-4))
    twice = window_mean(window_mean(jnp.asarray(scores), RADIUS), RADIUS)
    np.testing.assert_allclose(found, twice, atol=1e-5)


def test_a_blurred_step_becomes_the_pictures_step():
    pixels = np.zeros((16, 16, 3), np.float32)
    pixels[:, 9:] = [0.8, 0.3, 0.1]
    blurred = np.broadcast_to(np.linspace(0, 1, 16, dtype=np.float32), (16, 16))
    before = np.diff(blurred[8])[8]
    found = np.asarray(guided(jnp.asarray(blurred), guide(jnp.asarray(pixels), 4, 1e-4)))
    assert np.diff(found[8]).argmax() == 8
    assert np.diff(found[8])[8] > 4 * before
