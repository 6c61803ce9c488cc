"""Matching segments with classes and counting pixels, against plain loops over pixels and every possible match."""

from __future__ import annotations

from dataclasses import astuple
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seg4diff_jax.segmentation.metrics import IGNORED, confusion_matrix, mean_iou, pixel_accuracy
from seg4diff_jax.segmentation.unsupervised import MERGE_THRESHOLDS
from seg4diff_jax.segmentation.unsupervised_scores import (
    UNSUPERVISED_PROTOCOLS,
    MatchCounts,
    intersections,
    match_present,
    matched_counts,
    no_counts,
)
from tests.reference.unsupervised import count_matches

SIZE = (11, 17)
MOST = 12
CASES = {
    "more segments than classes": (4, 9),
    "more classes than segments": (8, 3),
    "more classes than there are rows for segments": (20, 6),
    "one class": (1, 5),
    "one segment": (4, 1),
}
FORMS = [(match, absent) for match in ("image", "row") for absent in (False, True)]


def an_image(classes: int, segments: int, seed: int = 0, ignored: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Truth and segments in patches, as they are in images; some classes are absent, some segments lie on ignored."""
    rng = np.random.default_rng(seed)
    patches = lambda values: np.kron(rng.choice(values, (3, 4)), np.ones((4, 5), int))[: SIZE[0], : SIZE[1]]
    truth = patches(rng.permutation(classes)[: max(1, classes - 2)])
    truth[rng.random(SIZE) < ignored] = IGNORED
    found = patches(segments)
    mixed = rng.random(SIZE) < 0.2
    found[mixed] = rng.integers(0, segments, mixed.sum())
    found[0, 0], truth[0, 0] = segments - 1, IGNORED
    return truth.astype(np.uint8), found.astype(np.int32)


def units_of(truth: np.ndarray, found: np.ndarray, classes: int, match: str) -> np.ndarray:
    count = lambda truth, found: intersections(truth, found, classes=classes, most=MOST)
    if match == "row":
        return np.asarray(jax.jit(jax.vmap(count))(truth, found))
    return np.asarray(jax.jit(count)(truth, found))[None]


def assert_counts(found: MatchCounts, expected) -> None:
    for name in ("hits", "false", "missed"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


# ---- counting -------------------------------------------------------------------------------------------------------


def test_intersections_count_every_pixel_once_with_ignored_ones_last():
    truth, found = an_image(5, 6)
    found[3:5] = -1  # outside the image
    expected = np.zeros((6, MOST), int)
    for true, guess in zip(truth.ravel(), found.ravel(), strict=True):
        if guess >= 0:
            expected[5 if true == IGNORED else true, guess] += 1
    np.testing.assert_array_equal(units_of(truth, found, 5, "image")[0], expected)
    np.testing.assert_array_equal(units_of(truth, found, 5, "row").sum(axis=0), expected)


@pytest.mark.parametrize(("match", "absent"), FORMS)
@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_plain_loops(case, match, absent):
    classes, segments = CASES[case]
    for seed in range(3):
        truth, found = an_image(classes, segments, seed)
        units = units_of(truth, found, classes, match)
        counts = matched_counts(units, classes=classes, absent_classes=absent)
        assert_counts(counts, count_matches(truth, found, classes, match, absent))
        assert (counts.hits + counts.missed).sum() == (truth != IGNORED).sum()


@pytest.mark.parametrize("absent", [False, True])
def test_ties_are_broken_as_scipy_breaks_them(absent):
    # Every segment shares as many pixels with every class, but segments differ on what is ignored.
    truth = np.tile([0, 1, 2, IGNORED], (4, 1)).astype(np.uint8)
    found = np.tile([[0], [1], [2], [3]], (1, 4)).astype(np.int32)
    for classes in (3, 5):
        for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
            some = found[order]
            counts = matched_counts(units_of(truth, some, classes, "image"), classes=classes, absent_classes=absent)
            assert_counts(counts, count_matches(truth, some, classes, "image", absent))


def test_the_match_shares_as_many_pixels_as_any():
    for seed in range(5):
        truth, found = an_image(5, 5, seed, ignored=0)
        units = units_of(truth, found, 5, "image")
        best = max(sum(units[0][c, s] for c, s in enumerate(order)) for order in permutations(range(5)))
        for absent in (False, True):
            assert matched_counts(units, classes=5, absent_classes=absent).hits.sum() == best


def test_a_perfect_partition_scores_one_whatever_its_numbers():
    truth = an_image(6, 1)[0] % 6
    found = np.random.default_rng(0).permutation(MOST)[truth].astype(np.int32)
    counts = matched_counts(units_of(truth, found, 6, "image"), classes=6, absent_classes=False)
    assert counts.mean_iou() == counts.pixel_accuracy() == 1


def test_a_leftover_segment_is_missed_pixels_and_with_absent_classes_an_absent_ones_false_positives():
    truth = np.zeros((1, 10), np.uint8)
    found = np.array([[0] * 6 + [1] * 4], np.int32)
    units = units_of(truth, found, 2, "image")
    ours = matched_counts(units, classes=2, absent_classes=False)
    assert (ours.hits.tolist(), ours.false.tolist(), ours.missed.tolist()) == ([6, 0], [0, 0], [4, 0])
    assert ours.mean_iou() == pytest.approx(0.6)
    theirs = matched_counts(units, classes=2, absent_classes=True)
    assert (theirs.hits.tolist(), theirs.false.tolist(), theirs.missed.tolist()) == ([6, 0], [0, 4], [4, 0])
    assert theirs.mean_iou() == pytest.approx(0.3)
    assert ours.pixel_accuracy() == theirs.pixel_accuracy() == pytest.approx(0.6)


def test_matching_rows_never_scores_fewer_hits_than_matching_the_image():
    for seed in range(5):
        truth, found = an_image(5, 6, seed)
        by = {
            match: matched_counts(units_of(truth, found, 5, match), classes=5, absent_classes=False).hits.sum()
            for match in ("image", "row")
        }
        assert by["row"] >= by["image"]


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_confusion_matrix_of_relabelled_segments():
    # The class of no segment stands last: it is never true.
    classes, total, confusion = 5, no_counts(5), np.zeros((6, 6), int)
    for seed in range(4):
        truth, found = an_image(classes, 3, seed)
        unit = units_of(truth, found, classes, "image")
        counts = matched_counts(unit, classes=classes, absent_classes=False)
        total += counts
        rows, columns = match_present(unit[0, :-1].astype(np.int64))
        relabelled = np.full(SIZE, classes)
        for c, s in zip(rows, columns, strict=True):
            relabelled[found == s] = c
        confusion += np.asarray(confusion_matrix(jnp.asarray(truth), jnp.asarray(relabelled), classes + 1))
    assert total.mean_iou() == pytest.approx(mean_iou(confusion))
    assert total.pixel_accuracy() == pytest.approx(pixel_accuracy(confusion))


def test_nothing_labelled_counts_for_nothing():
    truth = np.full(SIZE, IGNORED, np.uint8)
    for match, absent in FORMS:
        units = units_of(truth, np.zeros(SIZE, np.int32), 3, match)
        counts = matched_counts(units, classes=3, absent_classes=absent)
        assert_counts(counts, no_counts(3))
        assert np.isnan(counts.mean_iou())
        assert np.isnan(counts.pixel_accuracy())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ours", (MERGE_THRESHOLDS["pixel"], "pixel", "image", False, "pads")),
        ("release", (0.1, "token", "row", True, "pads")),
        ("release_config", (0.035, "token", "row", True, "pads")),
    ],
)
def test_protocols_have_names(name, expected):
    assert astuple(UNSUPERVISED_PROTOCOLS[name]) == expected
