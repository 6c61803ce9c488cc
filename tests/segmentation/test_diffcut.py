"""DiffCut, compared with plain loops, with brute force over all cuts, and with closed forms."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from seg4diff_jax.segmentation import diffcut as ours
from tests.reference import diffcut as reference
from tests.reference.random_weights import relative_error

TOKENS = 40
THRESHOLDS = np.array([0.02, 0.2, 0.5, 0.8], np.float32)


def features(seed: int = 0, regions: int = 4, noise: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    region = rng.integers(0, regions, TOKENS)
    return (rng.standard_normal((regions, 12))[region] + noise * rng.standard_normal((TOKENS, 12))).astype(np.float32)


def cut(weights: np.ndarray, threshold: float) -> list[list[int]]:
    return [part.tolist() for part in ours.parts_at(ours.cut_tree(weights, threshold), threshold)]


@pytest.mark.parametrize("seed", range(3))
def test_parts_are_those_of_plain_loops_at_every_threshold_of_one_tree(seed):
    weights = ours.affinity(ours.normalised_features(features(seed)))
    assert relative_error(weights, reference.affinity(features(seed).astype(float), ours.POWER)) <= 1e-6
    tree, counts = ours.cut_tree(weights, float(THRESHOLDS.max())), []
    for threshold in THRESHOLDS:
        found = [part.tolist() for part in ours.parts_at(tree, float(threshold))]
        assert found == sorted(reference.parts(weights, np.arange(TOKENS), float(threshold)))
        assert found == cut(weights, float(threshold)), "as in a tree of its own"
        assert sorted(token for part in found for token in part) == [*range(TOKENS)]
        counts.append(len(found))
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_clear_groups_have_the_lowest_cut_of_all():
    """Of every way to cut a small graph, tried one by one."""
    rng = np.random.default_rng(0)
    region = np.array([0, 1, 0, 1, 1, 0, 1, 0])
    weights = np.where(region[:, None] == region, 1.0, 0.05) * (1 + 0.1 * rng.random((8, 8)))
    weights = (weights + weights.T) / 2
    first, second, value = ours.best_cut(weights)
    every = [
        reference.normalized_cut(weights, np.isin(np.arange(8), some))
        for size in range(1, 8)
        for some in combinations(range(8), size)
    ]
    assert value == pytest.approx(min(every), rel=1e-12)
    assert {tuple(first), tuple(second)} == {(0, 2, 5, 7), (1, 3, 4, 6)}


def test_two_tokens_are_cut_by_how_alike_they_are():
    weights = np.array([[1.0, 0.25], [0.25, 1.0]])
    assert ours.best_cut(weights)[2] == pytest.approx(2 * 0.25 / 1.25)
    assert cut(weights, 0.41) == [[0], [1]]
    assert cut(weights, 0.39) == [[0, 1]]


@pytest.mark.parametrize("alike", [np.ones((9, 4)), np.zeros((9, 4))], ids=["equal", "zeros"])
def test_an_image_that_is_all_alike_is_one_segment(alike):
    (maps,) = ours.diffcut(alike.astype(np.float32), np.array([0.99]))
    assert maps.shape == (1, 9)


def test_maps_are_the_likeness_to_the_mean_of_each_part():
    some = features()
    each = ours.diffcut(some, THRESHOLDS)
    unit = some.astype(float) / np.linalg.norm(some.astype(float), axis=1, keepdims=True)
    weights = reference.affinity(some.astype(float), ours.POWER)
    for maps, threshold in zip(each, THRESHOLDS, strict=True):
        parts = sorted(reference.parts(weights, np.arange(TOKENS), float(threshold)))
        expected = np.array([[unit[part].mean(axis=0) @ one for one in unit] for part in parts])
        assert relative_error(maps, expected) <= 1e-5


def test_lanczoss_method_finds_the_same_parts(monkeypatch):
    weights = ours.affinity(ours.normalised_features(features(2)))
    expected = cut(weights, 0.5)
    assert len(expected) > 2
    monkeypatch.setattr(ours, "DENSE", 3)
    assert cut(weights, 0.5) == expected
