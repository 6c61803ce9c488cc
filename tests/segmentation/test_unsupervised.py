"""Segments without names, against plain loops in double precision, and their limits in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seg4diff_jax.segmentation import unsupervised as ours
from seg4diff_jax.segmentation.grouping import THRESHOLDS, check_threshold, segments_of_images
from seg4diff_jax.segmentation.unsupervised import MERGE_THRESHOLDS, merged_maps, segment_labels
from tests.reference import unsupervised as reference
from tests.reference.random_weights import relative_error
from tests.reference.ties import assert_same_labels
from tests.reference.unsupervised import thresholds_between

GRID = (12, 9)
PIXELS = GRID[0] * GRID[1]
MINMAX = ["pixel", "token"]


def random_attention(tokens: int = 20, seed: int = 0) -> np.ndarray:
    """[image, tokens]; each pixel's tokens have less than all of its attention."""
    logits = np.random.default_rng(seed).standard_normal((PIXELS, tokens)) * 2
    probs = np.exp(logits) / (np.exp(logits).sum(axis=1, keepdims=True) + 50)
    return probs.astype(np.float32)


def structured_attention(regions: int = 4, tokens: int = 24, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    """Tokens that attend to horizontal bands, several to each, in mixed order."""
    rng = np.random.default_rng(seed)
    band = np.arange(PIXELS) * regions // PIXELS
    of_token = rng.permutation(np.arange(tokens) % regions)
    clean = np.where(band[:, None] == of_token[None], 0.03, 0.002)
    return (clean * (1 + noise * rng.standard_normal((PIXELS, tokens)))).astype(np.float32)


ATTENTION = {
    "random": random_attention(),
    "bands": structured_attention(),
    "bands and copies": np.concatenate([structured_attention(seed=1), structured_attention(seed=1)], axis=1),
    "tiny": random_attention(seed=2) * np.float32(1e-3),
    "one token": random_attention(1),
    "one of all": random_attention(77, seed=3),
    "flat": np.full((PIXELS, 7), 0.01, np.float32),
}


# ---- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minmax", MINMAX)
@pytest.mark.parametrize("kind", ATTENTION)
def test_segments_are_those_of_plain_loops_at_every_threshold(kind, minmax):
    attention = ATTENTION[kind]
    traces, counts = [], []

    @jax.jit
    def program(attention, threshold):
        traces.append(threshold)
        return merged_maps(attention, threshold=threshold, minmax=minmax)

    for threshold in thresholds_between(attention, minmax):
        expected = reference.merged(attention, threshold, minmax)
        found = program(attention, threshold)
        assert found.count == len(expected)
        assert found.maps.shape == attention.T.shape
        assert relative_error(np.asarray(found.maps[: len(expected)]), expected) <= 1e-5
        assert not np.any(found.maps[len(expected) :])
        np.testing.assert_array_equal(found.present(), np.arange(attention.shape[1]) < len(expected))
        counts.append(len(expected))
    assert counts == sorted(counts, reverse=True) or kind.startswith(("random", "tiny", "one of all"))
    assert counts[-1] == 1
    assert len(traces) == 1, "one program serves every threshold and number of segments"


@pytest.mark.parametrize("minmax", MINMAX)
def test_bands_come_out_as_bands(minmax):
    attention = structured_attention()
    segments = merged_maps(jnp.asarray(attention), threshold=0.02, minmax=minmax)
    assert segments.count == 4
    labels = np.asarray(segment_labels(segments, GRID, GRID))
    assert [len(np.unique(labels[start : start + 3])) for start in (0, 3, 6, 9)] == [1, 1, 1, 1]
    assert len(np.unique(labels)) == 4


def test_a_map_claimed_before_still_counts_for_a_later_segment():
    # On a line: 0 and 2 are each near 1 but not near each other, so 1 is in both means.
    level = np.array([0.0, 0.5, 1.0])
    values = np.zeros((PIXELS, 3))
    values[: PIXELS // 2] = 1 - level
    values[PIXELS // 2 :] = level
    probs = np.stack([reference.softmax(one) for one in values.T])
    log_probs = jnp.log(jnp.asarray(probs, jnp.float32))
    near, far = reference.symmetric_kl(probs[0], probs[1]), reference.symmetric_kl(probs[0], probs[2])
    segments = ours.merge(jnp.exp(log_probs), ours.divergences(log_probs), (near + far) / 2)
    assert segments.count == 2
    np.testing.assert_allclose(segments.maps[0], probs[:2].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(segments.maps[1], probs[1:].mean(axis=0), rtol=1e-5)


def test_a_threshold_that_nothing_is_below_leaves_every_map_alone():
    attention = jnp.asarray(ATTENTION["bands and copies"])
    segments = merged_maps(attention, threshold=0.0)
    assert segments.count == 48
    expected = jax.nn.softmax(ours.normalised_maps(attention, "pixel"), axis=-1)
    np.testing.assert_allclose(segments.maps, expected, rtol=1e-6)


@pytest.mark.parametrize("minmax", MINMAX)
def test_equal_maps_are_one_segment_at_any_threshold(minmax):
    attention = np.repeat(random_attention(1), 9, axis=1)
    segments = merged_maps(jnp.asarray(attention), threshold=1e-30, minmax=minmax)
    assert segments.count == 1
    flat = merged_maps(jnp.full((PIXELS, 9), 0.02), threshold=1e-30, minmax=minmax)
    assert flat.count == 1
    np.testing.assert_allclose(flat.maps[0], 1 / PIXELS, rtol=1e-6)


def test_pixel_forgets_how_much_attention_a_token_has_and_token_does_not():
    attention = structured_attention(regions=2, tokens=2, noise=0)
    weighted = jnp.asarray(attention * np.array([1, 30], np.float32))
    pixel = ours.normalised_maps(weighted, "pixel")
    np.testing.assert_allclose(pixel.max(axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(pixel.min(axis=1), 0)
    token = ours.normalised_maps(weighted, "token")
    np.testing.assert_allclose(token.max(axis=0), 1, rtol=1e-4)
    np.testing.assert_allclose(token.min(axis=0), 0)


def test_divergences_are_exact_where_probabilities_are_tiny():
    logits = np.random.default_rng(0).standard_normal((6, 50)) * 40  # probabilities down to 1e-80
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [[reference.symmetric_kl(x, y) for y in np.exp(log_probs)] for x in np.exp(log_probs)]
    found = np.asarray(ours.divergences(jnp.asarray(log_probs, jnp.float32)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.diagonal(found), 0)
    np.testing.assert_allclose(found, found.T, rtol=1e-6)


def test_small_divergences_of_near_maps_do_not_drown_in_rounding():
    maps = np.random.default_rng(0).random((2, 4096))
    maps[1] = maps[0] + 1e-3 * maps[1]
    log_probs = maps - np.log(np.exp(maps).sum(axis=1, keepdims=True))
    expected = reference.symmetric_kl(*np.exp(log_probs))
    assert expected < 1e-6
    found = ours.divergences(jax.nn.log_softmax(jnp.asarray(maps, jnp.float32), axis=-1))[0, 1]
    np.testing.assert_allclose(found, expected, rtol=1e-2)


def test_a_batch_has_the_segments_of_each_image_under_vmap_and_of_many_thresholds_too():
    attention = np.stack([random_attention(20, seed) for seed in range(3)])
    probs = [reference.distributions(each, "pixel") for each in attention]
    thresholds = jnp.array([reference.threshold_near(wanted, *probs) for wanted in (0.005, 0.02, 0.05)])
    one = lambda attention, threshold: merged_maps(attention, threshold=threshold)
    every = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(attention, thresholds)
    for image in range(3):
        for place, threshold in enumerate(thresholds):
            alone = one(jnp.asarray(attention[image]), threshold)
            assert every.count[image, place] == alone.count
            np.testing.assert_allclose(every.maps[image, place], alone.maps, rtol=1e-6)
    assert len(np.unique(every.count)) > 2


# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minmax", MINMAX)
@pytest.mark.parametrize("size", [(48, 36), (50, 31), GRID, (5, 4)])
def test_labels_are_torchs_interpolation_of_the_merged_maps_and_its_argmax(size, minmax):
    attention = random_attention(30, seed=4)
    for threshold in thresholds_between(attention, minmax, 2):
        segments = merged_maps(jnp.asarray(attention), threshold=threshold, minmax=minmax)
        labels = np.asarray(segment_labels(segments, GRID, size))
        found = np.asarray(segments.maps[: int(segments.count)])
        assert_same_labels(labels, reference.labels_of(found, GRID, size), found.reshape(-1, *GRID), error=0)
        maps = reference.merged(attention, threshold, minmax)
        assert_same_labels(labels, reference.labels_of(maps, GRID, size), maps.reshape(-1, *GRID), few=1e-2)
        assert labels.dtype == np.int32
        assert labels.max() < segments.count


def test_on_the_host_one_program_serves_any_number_of_segments():
    compilations, counts = [], []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    attention = jnp.asarray(random_attention(30, seed=4)[None])
    for number, threshold in enumerate((1.0, 1e-9, 0.02, 0.025)):
        maps, count = segments_of_images(attention, [threshold], grid=GRID)
        found = ours.unsupervised_segmentation(np.asarray(maps[0, 0]).reshape(-1, *GRID), int(count[0, 0]), (40, 50))
        assert found.maps.shape == (found.segments, *GRID)
        assert_same_labels(found.labels, reference.labels_of(found.maps, GRID, (40, 50)), found.maps, error=0)
        counts.append(found.segments)
        if number == 0:
            compilations.clear()
    assert len(set(counts)) > 2
    assert not compilations


# ---- options --------------------------------------------------------------------------------------------------------


def test_the_default_threshold_depends_on_the_normalisation():
    assert check_threshold(None, "pixel") == MERGE_THRESHOLDS["pixel"]
    assert check_threshold(None, "token") == MERGE_THRESHOLDS["token"] == 0.1
    assert check_threshold(np.float32(0.5), "pixel") == 0.5


@pytest.mark.parametrize("threshold", [0, -1, float("nan"), float("inf"), "0.1", True])
def test_a_threshold_must_be_a_number_above_zero(threshold):
    with pytest.raises(ValueError, match=r"threshold is .*; expected a number above 0, such as 0\.0002"):
        check_threshold(threshold, "pixel")


def test_the_default_threshold_depends_on_the_grouping():
    for grouping, threshold in THRESHOLDS.items():
        assert check_threshold(None, "pixel", grouping) == threshold


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((None, "pixel", "kmeans"), "grouping is 'kmeans'; expected one of pads, diffseg, diffcut"),
        ((None, "token", "diffseg"), "minmax is 'token', which is of the grouping pads alone: leave it out"),
        ((1.0, "pixel", "diffcut"), r"threshold is 1\.0; expected below 1, such as 0\.\d+: from 1 on diffcut cuts"),
    ],
)
def test_a_grouping_that_means_nothing_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        check_threshold(*asked)


def test_another_normalisation_is_refused_by_name():
    with pytest.raises(ValueError, match="minmax is 'row'; expected one of pixel, token"):
        check_threshold(None, "row")
