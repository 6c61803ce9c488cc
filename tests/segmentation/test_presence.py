"""How well scores tell present classes from absent ones, against scikit-learn and the definitions written out."""

from __future__ import annotations

from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score, roc_auc_score

from seg4diff_jax.segmentation.presence import (
    SHARPEST,
    auc,
    auc_of_each,
    best_threshold,
    held_out_f1,
    presence_scores,
    reliability,
)
from tests.reference import further_metrics


def cases(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of few values, so that many tie, which are higher where a class is present."""
    draw = np.random.default_rng(seed)
    present = draw.random(count) < 0.3
    return np.round(np.clip(draw.normal(0.3 + 0.2 * present, 0.2), 0, 1), 1).astype(np.float32), present


def test_scores_of_presence_are_what_is_won_what_is_had_and_the_highest():
    draw = np.random.default_rng(1)
    scores = draw.random((5, 2 * SHARPEST + 1)).astype(np.float32)
    scores[1] = scores[0]  # ties go to the earlier class
    scores[4] += 10  # not asked for: it takes nothing from the others
    asked = np.array([True, True, True, True, False])
    found = np.asarray(presence_scores(jnp.asarray(scores), jnp.asarray(asked)))[:, :4]
    np.testing.assert_allclose(found, further_metrics.presence(scores[:4]), rtol=1e-5)
    assert found[0, 1] == 0
    assert found[0].sum() == pytest.approx(1)


def test_tokens_that_attend_to_no_class_have_no_share():
    area, share, peak = np.asarray(presence_scores(jnp.zeros((2, 8)), jnp.ones(2, bool)))
    assert (area.tolist(), share.tolist(), peak.tolist()) == ([1, 0], [0, 0], [0, 0])


@pytest.mark.parametrize("seed", range(3))
def test_auc_is_scikit_learns_and_the_share_of_pairs_in_order(seed):
    scores, present = cases(60, seed)
    pairs = [(p > a) + (p == a) / 2 for p, a in product(scores[present], scores[~present])]
    assert auc(scores, present) == pytest.approx(roc_auc_score(present, scores), abs=1e-12)
    assert auc(scores, present) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(np.zeros_like(scores), present) == 0.5


def test_auc_of_each_leaves_out_what_was_not_asked_for_and_has_none_of_what_is_always_there():
    scores, present = (each.reshape(6, 30) for each in cases(180))
    present[2], present[3] = True, False
    scores[0, ::3] = np.nan
    found = auc_of_each(scores, present)
    assert np.isnan(found).tolist() == [False, False, True, True, False, False]
    left = ~np.isnan(scores[0])
    assert found[0] == pytest.approx(roc_auc_score(present[0, left], scores[0, left]))


def brute_threshold(scores: np.ndarray, present: np.ndarray) -> float:
    tried = sorted(np.unique(scores), reverse=True)
    return tried[int(np.argmax([f1_score(present, scores >= each) for each in tried]))]


@pytest.mark.parametrize("seed", range(3))
def test_the_best_threshold_is_the_best_of_all_scores(seed):
    scores, present = cases(80, seed)
    assert best_threshold(scores, present) == pytest.approx(brute_threshold(scores, present))


def test_there_is_no_threshold_where_nothing_is_present():
    assert np.isnan(best_threshold(np.ones(3), np.zeros(3, bool)))
    assert np.isnan(best_threshold(np.zeros(0), np.zeros(0, bool)))
    assert np.isnan(held_out_f1(np.ones((4, 2)), np.zeros((4, 2), bool)))
    assert np.isnan(held_out_f1(np.ones((1, 2)), np.ones((1, 2), bool))), "a single image has no others"


@pytest.mark.parametrize("images", [7, 23])
def test_each_image_is_decided_at_the_threshold_of_the_others(images):
    scores, present = (each.reshape(images, 5) for each in cases(5 * images))
    scores[1, 2:] = scores[4, 0] = np.nan
    asked, said = ~np.isnan(scores), np.zeros_like(present)
    for image in range(images):
        others = np.arange(images) % 10 != image % 10
        threshold = brute_threshold(scores[others][asked[others]], present[others][asked[others]])
        said[image] = asked[image] & (scores[image] >= threshold)
    assert held_out_f1(scores, present) == pytest.approx(f1_score(present[asked], said[asked]))


def test_a_threshold_of_their_own_would_flatter_scores_that_know_nothing():
    draw = np.random.default_rng(0)
    scores, present = draw.random((11, 2)), draw.random((11, 2)) < 0.4
    own = best_threshold(scores.ravel(), present.ravel())
    assert held_out_f1(scores, present) < f1_score(present.ravel(), scores.ravel() >= own)


def test_bins_of_reliability_are_scikit_learns():
    draw = np.random.default_rng(2)
    scores = draw.random(500).astype(np.float32) ** 2
    present = draw.random(500) < 0.5 * scores + 0.2
    found = reliability(scores, present)
    shares, means = calibration_curve(present, scores, n_bins=10)
    np.testing.assert_allclose(found.present, shares, rtol=1e-6)
    np.testing.assert_allclose(found.score, means, rtol=1e-6)
    assert found.cases.sum() == 500
    place = np.minimum((scores * 10).astype(int), 9)
    expected = sum(
        (place == each).mean() * abs(scores[place == each].mean() - present[place == each].mean()) for each in range(10)
    )
    assert found.error == pytest.approx(expected, abs=1e-6)


def test_probabilities_have_no_error_and_an_empty_bin_no_mean():
    found = reliability(np.array([0.5, 0.5, 1.0]), np.array([True, False, True]))
    assert found.error == 0
    assert found.cases.tolist() == [0] * 5 + [2, 0, 0, 0, 1]
    assert np.isnan(found.score[0])
    assert np.isnan(reliability(np.zeros(0), np.zeros(0, bool)).error)
