"""Scores of many thresholds in one pass, against segmenting each image by itself and counting pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest

from seg4diff_jax.analysis import merge_threshold
from seg4diff_jax.analysis.merge_threshold import (
    at_thresholds,
    best_score,
    unsupervised_scores,
)
from seg4diff_jax.flow import image_noise
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.segmentation.unsupervised import UnsupervisedSegmentation
from seg4diff_jax.segmentation.unsupervised_scores import PROTOCOLS, MatchCounts, UnsupervisedProtocol
from seg4diff_jax.segmentation.unsupervised_tally import UnsupervisedScore
from tests.reference.inputs import SQUARE, VARIED, an_image
from tests.reference.ties import undecided
from tests.reference.unsupervised import IGNORED, Counts, count_matches

CLASSES = 4
SIZES = [(40, 60), (50, 30), (SQUARE, SQUARE)]
PROTOCOLS_HERE = [
    *at_thresholds(PROTOCOLS["ours"], (0.004, 0.02, 1.0)),
    UnsupervisedProtocol(0.02, "pixel", "image", absent_classes=True),
    *at_thresholds(PROTOCOLS["release"], (0.001, 0.1)),
]


def an_item(number: int, size: tuple[int, int]) -> dict:
    rng = np.random.default_rng(number)
    patches = rng.choice([0, 2, 3, IGNORED], (4, 3)).astype(np.uint8)
    labels = np.kron(patches, np.ones((-(-size[0] // 4), -(-size[1] // 3)), np.uint8))[: size[0], : size[1]]
    return {"image": an_image(*size, number), "labels": labels, "name": str(number)}


SOURCE = [an_item(number, size) for number, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def alone(sd3) -> dict[UnsupervisedProtocol, list[UnsupervisedSegmentation]]:
    """Segments of each image by itself."""
    noises = [np.asarray(image_noise(3, [number], (SQUARE // 8, SQUARE // 8, 16))) for number in range(len(SIZES))]
    how = {"block": VARIED, "size": (SQUARE, SQUARE)}
    return {
        protocol: [
            sd3.segment_unsupervised(
                item["image"], noise=noise, threshold=protocol.threshold, minmax=protocol.minmax, **how
            )
            for item, noise in zip(SOURCE, noises, strict=True)
        ]
        for protocol in PROTOCOLS_HERE
    }


@pytest.fixture(scope="module")
def decided(alone) -> list[dict]:
    """`SOURCE` without the pixels that rounding can decide about: of the rest every run counts the same."""
    items = []
    for number, item in enumerate(SOURCE):
        ties = np.any([undecided(found[number].maps, SIZES[number]) for found in alone.values()], axis=0)
        assert ties.mean() <= 0.02
        items.append(item | {"labels": np.where(ties, np.uint8(IGNORED), item["labels"])})
    return items


@pytest.fixture(scope="module")
def scores(sd3, decided) -> list[UnsupervisedScore]:
    told = []
    found = unsupervised_scores(
        sd3, decided, CLASSES, PROTOCOLS_HERE, block=VARIED, seed=3, batch_size=2, progress=told.append
    )
    assert told == [2, 3]
    return found


@pytest.mark.parametrize("place", range(len(PROTOCOLS_HERE)), ids=map(str, PROTOCOLS_HERE))
def test_a_protocols_counts_are_those_of_every_image_by_itself(alone, decided, scores, place):
    protocol, found = PROTOCOLS_HERE[place], scores[place]
    total, segments = Counts(*np.zeros((3, CLASSES), int)), 0
    for item, ours in zip(decided, alone[protocol], strict=True):
        segments += ours.segments
        one = count_matches(item["labels"], ours.labels, CLASSES, protocol.match, protocol.absent_classes)
        total = Counts(*(getattr(total, name) + getattr(one, name) for name in ("hits", "false", "missed")))
    assert found.protocol == protocol
    assert found.segments == pytest.approx(segments / len(SOURCE))
    for name in ("hits", "false", "missed"):
        np.testing.assert_array_equal(getattr(found.counts, name), getattr(total, name), name)
    assert (found.counts.hits + found.counts.missed).sum() == sum((item["labels"] != IGNORED).sum() for item in decided)


def test_the_transformer_runs_once_for_each_batch_whatever_is_tried(sd3, monkeypatch):
    run, calls = Pipeline.empty_prompt_attention, []
    monkeypatch.setattr(Pipeline, "empty_prompt_attention", lambda *a, **k: calls.append(0) or run(*a, **k))
    unsupervised_scores(sd3, SOURCE, CLASSES, PROTOCOLS_HERE, block=VARIED, batch_size=2)
    assert len(calls) == 2


def test_batches_of_any_size_score_alike(sd3, decided, scores):
    found = unsupervised_scores(sd3, decided, CLASSES, PROTOCOLS_HERE[:3], block=VARIED, seed=3, batch_size=3)
    for one, expected in zip(found, scores, strict=False):
        assert one.counts.mean_iou() == pytest.approx(expected.counts.mean_iou(), abs=1e-9)
        assert one.segments == expected.segments


def test_the_best_is_the_first_of_the_highest_mean_iou():
    score = lambda threshold, hits: UnsupervisedScore(
        UnsupervisedProtocol(threshold), MatchCounts(*np.array([[hits], [0], [4 - hits]])), 1.0
    )
    nothing = UnsupervisedScore(UnsupervisedProtocol(0.5), MatchCounts(*np.zeros((3, 1), int)), 1.0)
    assert best_score([nothing, score(0.1, 1), score(0.2, 3), score(0.3, 3)]).protocol.threshold == 0.2


def test_thresholds_that_are_tried_rise_evenly():
    ratios = np.array(merge_threshold.THRESHOLDS[1:]) / merge_threshold.THRESHOLDS[:-1]
    np.testing.assert_allclose(ratios, 2**0.5, rtol=0.05)


def test_nothing_to_score_is_refused(sd3):
    with pytest.raises(ValueError, match="0 images and 1 protocols"):
        unsupervised_scores(sd3, [], CLASSES, PROTOCOLS_HERE[:1], block=VARIED)
    with pytest.raises(ValueError, match="3 images and 0 protocols"):
        unsupervised_scores(sd3, SOURCE, CLASSES, [], block=VARIED)


def test_attention_that_is_not_finite_is_told(sd3, monkeypatch):
    run = Pipeline.empty_prompt_attention
    monkeypatch.setattr(Pipeline, "empty_prompt_attention", lambda *a, **k: run(*a, **k).at[0, 0, 0].set(np.nan))
    with pytest.raises(FloatingPointError, match="attention is not finite"):
        unsupervised_scores(sd3, SOURCE, CLASSES, PROTOCOLS_HERE, block=VARIED, batch_size=2)
