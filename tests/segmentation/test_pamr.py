"""Pixel-adaptive mask refinement, compared with PyTorch and with closed forms."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from seg4diff_jax.segmentation.pamr import DILATIONS, affinities, averaged
from tests.reference.pamr import refined
from tests.reference.random_weights import relative_error

HEIGHT, WIDTH = 20, 31


def picture(seed: int = 0) -> np.ndarray:
    """Smaller than the widest window, so that windows end beyond every edge."""
    return np.random.default_rng(seed).random((HEIGHT, WIDTH, 3)).astype(np.float32)


def maps(classes: int = 3) -> np.ndarray:
    return np.random.default_rng(1).random((classes, HEIGHT, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("rounds", [1, 10])
def test_it_is_that_of_pytorch(rounds):
    pixels, scores = picture(), maps()
    by = affinities(jnp.asarray(pixels), rounds)
    found = jax.jit(jax.vmap(partial(averaged, by=by)))(scores)
    expected = refined(torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(scores), rounds, DILATIONS)
    assert relative_error(found, expected.numpy()) <= 1e-5
    assert np.abs(expected.numpy() - scores).max() > 0.1


def test_without_rounds_nothing_changes():
    scores = maps()[0]
    np.testing.assert_array_equal(averaged(jnp.asarray(scores), affinities(jnp.asarray(picture()), 0)), scores)


def test_only_differences_of_colours_count_in_parts_of_each_other():
    pixels = picture()
    plain, scaled = (affinities(jnp.asarray(each), 1).weights for each in (pixels, 0.3 * pixels + 0.2))
    np.testing.assert_allclose(plain, scaled, atol=1e-5)
    np.testing.assert_allclose(np.asarray(plain).sum(axis=0), 1, rtol=1e-5)


def test_maps_stay_within_their_range_and_a_constant_map_stays_as_it_is():
    by = affinities(jnp.asarray(picture()), 10)
    scores = maps()[0]
    found = np.asarray(averaged(jnp.asarray(scores), by))
    assert scores.min() <= found.min() <= found.max() <= scores.max()
    np.testing.assert_allclose(averaged(jnp.full((HEIGHT, WIDTH), 0.3), by), 0.3, rtol=1e-5)


def test_in_a_picture_of_one_colour_all_neighbours_count_alike():
    by = affinities(jnp.full((HEIGHT, WIDTH, 3), 0.5), 1)
    np.testing.assert_allclose(by.weights, 1 / (8 * len(DILATIONS)), rtol=1e-6)


def test_a_blurred_step_becomes_the_pictures_step():
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    pixels[:, 17:] = [0.8, 0.3, 0.1]
    blurred = np.broadcast_to(np.linspace(0, 1, WIDTH, dtype=np.float32), (HEIGHT, WIDTH))
    found = np.asarray(averaged(jnp.asarray(blurred), affinities(jnp.asarray(pixels), 10)))[10]
    assert np.diff(found).argmax() == 16
    assert np.diff(found)[16] > 5 * np.diff(blurred[10])[16]
