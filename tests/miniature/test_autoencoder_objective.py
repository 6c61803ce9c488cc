"""Distances between latents, against those between pieces of the picture."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seg4diff_jax.miniature.autoencoder import distance_error

PIXELS = np.random.default_rng(0).uniform(-1, 1, (3, 12, 20, 3)).astype(np.float32)


def pieces() -> np.ndarray:
    """[batch, rows, columns, 48] by slicing."""
    rows = [[PIXELS[:, y : y + 4, x : x + 4].reshape(3, -1) for x in range(0, 20, 4)] for y in range(0, 12, 4)]
    return np.stack([np.stack(row, axis=1) for row in rows], axis=1)


def test_latents_that_are_the_pieces_turned_about_have_no_error():
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(48, 48)))[0].astype(np.float32)
    assert float(distance_error(jnp.asarray(pieces() @ turn + 3), jnp.asarray(PIXELS), jax.random.key(0))) < 1e-5


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_latents_of_another_size_err_by_the_square_of_it(factor):
    error = distance_error(jnp.asarray(factor * pieces()), jnp.asarray(PIXELS), jax.random.key(0))
    np.testing.assert_allclose(error, abs(factor**2 - 1), rtol=1e-5)


def test_the_error_is_the_mean_over_pairs_of_any_pictures():
    latents = np.random.default_rng(2).normal(size=(3, 3, 5, 7)).astype(np.float32)
    key = jax.random.key(5)
    order = np.asarray(jax.random.permutation(key, 45))
    flat, pixels = latents.reshape(45, 7), pieces().reshape(45, 48)
    found = [np.mean((flat[i] - flat[j]) ** 2) for i, j in enumerate(order)]
    wanted = [np.mean((pixels[i] - pixels[j]) ** 2) for i, j in enumerate(order)]
    expected = np.mean(np.abs(np.subtract(found, wanted))) / np.mean(wanted)
    np.testing.assert_allclose(distance_error(jnp.asarray(latents), jnp.asarray(PIXELS), key), expected, rtol=1e-5)
    assert np.sum(order // 15 != np.arange(45) // 15) > 20
