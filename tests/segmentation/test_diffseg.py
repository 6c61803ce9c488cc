"""DiffSeg, compared with plain loops over the whole matrix of attention."""

from __future__ import annotations

from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seg4diff_jax.segmentation.diffseg import ROUNDS, anchor_tokens, diffseg, divergences, log_maps
from tests.reference import diffseg as reference
from tests.reference.random_weights import relative_error
from tests.reference.unsupervised import symmetric_kl

GRID = (6, 7)
TOKENS = GRID[0] * GRID[1]


def vectors(seed: int = 0, regions: int = 4, heads: int = 3, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys of regions whose tokens attend to each other, more or less."""
    rng = np.random.default_rng(seed)
    region = rng.integers(0, regions, TOKENS)
    centres = 2 * rng.standard_normal((regions, heads, 8))
    each = lambda: (centres[region] + noise * rng.standard_normal((TOKENS, heads, 8))).astype(np.float32)
    return each(), each()


def assert_those_of_plain_loops(q: np.ndarray, k: np.ndarray, anchors: list[int], threshold: float, found) -> int:
    expected, nearest = reference.merged(reference.attention(q, k), anchors, threshold, ROUNDS)
    assert nearest > 1e-4, f"{threshold} is too near to a divergence: take another"
    assert found.count == len(expected)
    assert relative_error(found.maps[: len(expected)], expected) <= 1e-5
    np.testing.assert_array_equal(found.maps[len(expected) :], 0)
    return len(expected)


@pytest.mark.parametrize("chunk", [None, 5, 1])
def test_segments_are_those_of_plain_loops_however_many_maps_are_held(chunk):
    (q, k), thresholds = vectors(), np.array([0.02, 0.2, 1.0, 4.0], np.float32)
    found = diffseg(jnp.asarray(q), jnp.asarray(k), jnp.asarray(thresholds), grid=GRID, chunk=chunk)
    counts = [
        assert_those_of_plain_loops(q, k, [*range(TOKENS)], float(threshold), jax.tree.map(itemgetter(at), found))
        for at, threshold in enumerate(thresholds)
    ]
    assert counts[0] > counts[1] >= counts[2] > counts[3] - 1
    np.testing.assert_allclose(np.asarray(found.maps).sum(axis=-1)[0, : counts[0]], 1, rtol=1e-5)


def test_anchors_are_evenly_spaced_in_the_middle_and_every_token_of_a_small_grid(monkeypatch):
    np.testing.assert_array_equal(anchor_tokens(GRID), range(TOKENS))
    monkeypatch.setattr("seg4diff_jax.segmentation.diffseg.ANCHORS", 3)
    rows, columns = np.divmod(anchor_tokens((8, 5)), 5)
    assert sorted(set(rows.tolist())) == [0, 3, 6]
    assert sorted(set(columns.tolist())) == [0, 2, 4]
    np.testing.assert_array_equal(anchor_tokens((1, 2)), [0, 1])


def test_with_fewer_anchors_all_tokens_still_count_in_the_first_round(monkeypatch):
    monkeypatch.setattr("seg4diff_jax.segmentation.diffseg.ANCHORS", 3)
    q, k = vectors(1)
    anchors = anchor_tokens(GRID)
    assert len(anchors) == 9
    found = diffseg(jnp.asarray(q), jnp.asarray(k), jnp.array([0.3]), grid=GRID, chunk=4)
    assert_those_of_plain_loops(q, k, anchors.tolist(), 0.3, jax.tree.map(itemgetter(0), found))


def test_a_batch_under_vmap_has_the_segments_of_each_image():
    each = [vectors(seed) for seed in range(2)]
    q, k = (jnp.asarray(np.stack(some)) for some in zip(*each, strict=True))
    one = lambda q, k: diffseg(q, k, jnp.array([0.3]), grid=GRID)
    together = jax.vmap(one)(q, k)
    for place in range(2):
        alone = one(q[place], k[place])
        np.testing.assert_array_equal(together.count[place], alone.count)
        np.testing.assert_allclose(together.maps[place], alone.maps, rtol=1e-5, atol=1e-7)


def test_logarithms_stay_finite_where_probabilities_vanish():
    q, k = (100 * x for x in vectors())
    found = np.asarray(log_maps(jnp.asarray(q), jnp.asarray(k)))
    assert np.isfinite(found).all()
    assert (np.exp(found) == 0).any()
    assert np.isfinite(diffseg(jnp.asarray(q), jnp.asarray(k), jnp.array([0.3]), grid=GRID).maps).all()


def test_small_divergences_of_near_maps_do_not_drown_in_rounding():
    q, k = vectors(noise=0.0)
    near = (1e-3 * q, k + 0 * q), (1e-3 * q[::-1], k)
    some, others = (log_maps(jnp.asarray(x), jnp.asarray(y)) for x, y in near)
    exact = [np.exp(np.asarray(each, np.float64)) for each in (some, others)]
    expected = np.array([[symmetric_kl(x, y) for y in exact[1]] for x in exact[0]])
    assert 0 < expected.max() < 1e-3
    np.testing.assert_allclose(divergences(some, others), expected, atol=2e-3 * expected.max())


def test_nothing_of_tokens_by_tokens_is_held():
    q = jnp.zeros((1024, 2, 8))
    lowered = jax.jit(lambda q, k: diffseg(q, k, jnp.array([0.3]), grid=(32, 32), chunk=16)).lower(q, q).as_text()
    assert "1024x1024x" not in lowered
    assert "256x1024x" in lowered, "the anchors' maps"
