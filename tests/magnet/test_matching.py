"""One-to-one matching costs what SciPy's does, and picks the same maps where there is one best choice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from seg4diff_jax.magnet.matching import largest_first, match, matching_costs, nearest
from tests.reference import magnet as reference
from tests.reference.largest_array import largest_array
from tests.reference.magnet import random_masks
from tests.reference.random_weights import relative_error
from tests.reference.ties import assert_one_best

match_all = jax.jit(jax.vmap(match))


def padding(rng: np.random.Generator, batch: int, masks: int) -> np.ndarray:
    """Any number of real rows, none and all included, anywhere."""
    counts = [0, masks, *rng.integers(0, masks + 1, batch - 2)]
    return np.stack([rng.permutation(np.arange(masks) < count) for count in counts])


def assert_one_to_one(chosen: np.ndarray, maps: int) -> None:
    assert all(len(set(row)) == len(row) for row in chosen.tolist())
    assert chosen.min() >= 0
    assert chosen.max() < maps


@pytest.mark.parametrize("ties", [False, True], ids=["distinct costs", "many ties"])
@pytest.mark.parametrize(("maps", "masks"), [(40, 7), (9, 9), (5, 1)])
def test_real_masks_get_maps_of_the_least_total_cost_whatever_the_padding(maps, masks, ties):
    rng = np.random.default_rng(maps)
    batch = 24
    costs = rng.integers(0, 4, (batch, maps, masks)) if ties else rng.standard_normal((batch, maps, masks))
    costs, real = costs.astype(np.float32), padding(rng, batch, masks)
    costs = np.where(real[:, None], costs, -100 * costs)  # a padded row's own numbers must not matter
    chosen = np.asarray(match_all(costs, real))
    assert_one_to_one(chosen, maps)
    for cost, row, kept in zip(costs, chosen, real, strict=True):
        expected_maps, expected_masks = linear_sum_assignment(cost[:, kept])
        expected = cost[:, kept][expected_maps, expected_masks].sum(dtype=np.float64)
        found = cost[row[kept], np.flatnonzero(kept)].sum(dtype=np.float64)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
        if not ties:
            assert_one_best(cost[:, kept])
            np.testing.assert_array_equal(row[kept], expected_maps[np.argsort(expected_masks)])


def test_a_padded_row_never_takes_the_map_that_a_real_mask_wants():
    costs = np.full((1, 4, 4), 5, np.float32)
    costs[0, 2, 3] = 4.999  # the only map that the last row prefers
    for real in ([False, False, False, True], [True, False, True, True]):
        chosen = np.asarray(match_all(costs, np.array([real])))
        assert chosen[0, 3] == 2
        assert_one_to_one(chosen, 4)


def test_published_shapes_are_matched_as_scipy_matches_them():
    rng = np.random.default_rng(0)
    # Maps of one head are alike: many masks want the same few, and the search has to go far.
    costs = rng.random((1, 1848, 32)) * 0.05 + rng.random((1, 1848, 1)) + rng.random((1, 1, 32))
    costs = costs.astype(np.float32)
    real = np.arange(32)[None] < 29
    chosen = np.asarray(match_all(costs, real))
    assert_one_to_one(chosen, 1848)
    assert_one_best(costs[0, :, :29])
    maps, masks = linear_sum_assignment(costs[0, :, :29])
    np.testing.assert_array_equal(chosen[0, :29], maps[np.argsort(masks)])


def test_costs_that_are_infinite_or_no_numbers_end_in_a_matching():
    costs = np.random.default_rng(0).random((4, 12, 5)).astype(np.float32)
    costs[0] = np.nan
    costs[1] = np.inf
    costs[2, :, 0], costs[2, 3] = np.nan, -np.inf
    costs[3, :6] = np.inf
    chosen = np.asarray(match_all(costs, np.ones((4, 5), bool)))
    assert_one_to_one(chosen, 12)
    assert chosen[3].min() >= 6


def test_the_largest_masks_are_kept_largest_first_and_small_ones_left_out():
    areas = np.array([50, 900, 51, 4000, 900, 0, 51])
    assert largest_first(areas, 10_000).tolist() == [3, 1, 4, 2, 6]  # 50 is not more than 0.5 %
    assert largest_first(areas, 10_000, rows=2).tolist() == [3, 1]
    assert largest_first(areas, 10_000, least=0.0).tolist() == [3, 1, 4, 2, 6, 0]
    assert largest_first(areas[:0], 10_000).tolist() == []
    assert len(largest_first(np.full(40, 60), 10_000)) == 32


def test_more_masks_than_maps_are_refused():
    with pytest.raises(ValueError, match="6 masks cannot each have one of 5 maps"):
        match(jnp.zeros((5, 6)), jnp.ones(6, bool))


@pytest.mark.parametrize("focal", ["sigmoid", "release"])
def test_costs_are_those_of_every_pair_by_itself(focal):
    maps = (4 * np.random.default_rng(0).standard_normal((7, 6, 8))).astype(np.float32)
    masks = random_masks((5, 50, 41))
    expected = reference.costs(torch.tensor(maps, dtype=torch.float64), torch.tensor(masks), release=focal == "release")
    found = matching_costs(jnp.asarray(maps), nearest(jnp.asarray(masks), (6, 8)), focal=focal)
    assert found.shape == (7, 5)
    assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize(
    ("size", "grid"), [((50, 41), (6, 8)), ((64, 64), (16, 16)), ((7, 9), (7, 9)), ((5, 5), (9, 7))]
)
def test_masks_are_resized_by_torchs_nearest(size, grid):
    masks = np.random.default_rng(0).random((3, *size)) < 0.5
    expected = F.interpolate(torch.tensor(masks)[None].float(), size=grid, mode="nearest")[0] > 0
    np.testing.assert_array_equal(nearest(jnp.asarray(masks), grid), expected.numpy())


def test_no_array_of_published_shapes_holds_maps_times_masks_times_pixels():
    maps = jax.ShapeDtypeStruct((24 * 77, 64, 64), jnp.float32)
    masks, real = jax.ShapeDtypeStruct((32, 64, 64), bool), jax.ShapeDtypeStruct((32,), bool)
    whole = lambda maps, masks, real: match(matching_costs(maps, masks), real)
    assert largest_array(whole, maps, masks, real) == 24 * 77 * 64 * 64
