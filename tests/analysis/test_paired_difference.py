"""Intervals of paired differences: closed forms, SciPy's bootstrap, and groups that stay together."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from seg4diff_jax.analysis.paired_difference import AT_ONCE, expanded_tail, paired_difference


def drawn(pairs: int, shift: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two measurements of the same things, whose own spread is far larger than that of their difference."""
    draw = np.random.default_rng(seed)
    first = draw.normal(27, 5, pairs)
    return first, first + draw.normal(shift, 0.5, pairs)


def test_two_groups_have_the_interval_from_one_difference_to_the_other():
    """Of four equally likely draws one is of the first group alone, and one of the second."""
    found = paired_difference(np.array([1.0, 2.0]), np.array([2.0, 5.0]), np.array([7, 3]))
    assert found == (2.0, 1.0, 3.0)
    assert found.excludes_zero
    assert not paired_difference(np.array([1.0, 2.0]), np.array([2.0, 1.5]), np.array([0, 1])).excludes_zero


def test_equal_differences_have_an_interval_of_no_width():
    first, _ = drawn(20)
    found = paired_difference(first, first - 0.25, np.arange(20))
    np.testing.assert_allclose(found, -0.25, atol=1e-12)
    assert found.excludes_zero


def test_of_many_groups_the_interval_is_that_of_the_normal_distribution():
    first, second = drawn(4000, shift=0.02)
    found = paired_difference(first, second, np.arange(4000))
    differences = second - first
    error = differences.std() / np.sqrt(4000)
    assert found.mean == pytest.approx(differences.mean())
    np.testing.assert_allclose(found[1:], differences.mean() + np.array([-1.96, 1.96]) * error, atol=0.15 * error)


@pytest.mark.parametrize("pairs", [5, 30, 200])
def test_the_interval_is_scipys_paired_bootstrap(pairs):
    first, second = drawn(pairs, shift=0.3)
    found = paired_difference(first, second, np.arange(pairs))
    expected = scipy.stats.bootstrap(
        (first, second),
        lambda a, b, axis: (b - a).mean(axis=axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        confidence_level=1 - 2 * expanded_tail(pairs),
        rng=np.random.default_rng(1),
    )
    low, high = expected.confidence_interval
    spread = expected.standard_error  # a percentile of 10,000 draws is known to about 3 % of it
    np.testing.assert_allclose(found[1:], [low, high], atol=0.15 * spread)


@pytest.mark.parametrize("groups", [8, 16, 40])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(groups):
    """The percentile interval alone holds it in 89 % of cases with 8 groups. A thousand cases tell it to 2 %."""
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        found = paired_difference(np.zeros(groups), draw.normal(0, 1, groups), np.arange(groups), resamples=1000)
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / 1000 <= 0.98


def test_pictures_of_one_prompt_are_drawn_together():
    """Ten equal pairs a group say no more than one, and pairs in any order are those of their group."""
    first, second = drawn(30, shift=0.3)
    alone = paired_difference(first, second, np.arange(30))
    order = np.random.default_rng(2).permutation(300)
    repeated = [np.repeat(each, 10)[order] for each in (first, second, np.arange(30))]
    np.testing.assert_allclose(paired_difference(*repeated), alone, atol=1e-12)
    apart = paired_difference(*repeated[:2], np.arange(300))
    assert apart.high - apart.low < 0.5 * (alone.high - alone.low)


def test_groups_of_different_sizes_count_by_their_pairs():
    first, second = np.zeros(5), np.array([1.0, 1.0, 1.0, 1.0, 6.0])
    found = paired_difference(first, second, np.array([0, 0, 0, 0, 1]))
    assert found == (2.0, 1.0, 6.0)


def test_draws_do_not_depend_on_how_many_are_in_memory(monkeypatch):
    first, second = drawn(50)
    whole = paired_difference(first, second, np.arange(50))
    monkeypatch.setattr("seg4diff_jax.analysis.paired_difference.AT_ONCE", 501)
    assert AT_ONCE > 50 * 10
    np.testing.assert_allclose(paired_difference(first, second, np.arange(50)), whole, atol=0.05)
    assert paired_difference(first, second, np.arange(50)) == paired_difference(first, second, np.arange(50))
    assert paired_difference(first, second, np.arange(50), seed=1) != whole


def test_one_group_and_numbers_that_are_none_are_refused():
    first, second = drawn(4)
    with pytest.raises(ValueError, match="needs at least two of them, found 1"):
        paired_difference(first, second, np.zeros(4, int))
    with pytest.raises(ValueError, match="not finite"):
        paired_difference(first, second * np.nan, np.arange(4))
