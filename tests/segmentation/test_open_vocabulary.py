"""From attention maps to labels: compared with PyTorch's interpolation and with plain loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seg4diff_jax.bilinear import bilinear_matrix
from seg4diff_jax.segmentation.open_vocabulary import (
    class_scores,
    combine_prompts,
    label_map,
    padded_rows,
    upsampled_labels,
)
from seg4diff_jax.text import ClassPrompts, TokenSpan
from tests.reference.largest_array import largest_array
from tests.reference.random_weights import relative_error
from tests.reference.ties import assert_same_labels

SIZES = [(1, 1), (3, 4), (9, 12), (10, 25), (48, 31), (64, 64)]


def random_scores(classes: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((classes, rows, columns), dtype=np.float32)


def torch_labels(scores: np.ndarray, size: tuple[int, int], present: np.ndarray | None = None) -> np.ndarray:
    upsampled = F.interpolate(torch.from_numpy(scores)[None], size=size, mode="bilinear", align_corners=False)[0]
    if present is not None:
        upsampled[torch.from_numpy(~present)] = -torch.inf
    return upsampled.argmax(0).numpy()


# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "size"), [((6, 8), (60, 100)), ((9, 12), (7, 5)), ((5, 7), (5, 7))])
def test_labels_are_torchs_interpolation_and_its_argmax(grid, size):
    scores = random_scores(5, *grid)
    labels = label_map(jnp.asarray(scores), size)
    assert labels.shape == size
    assert labels.dtype == jnp.int32
    assert_same_labels(np.asarray(labels), torch_labels(scores, size), scores, error=0)


def test_one_program_on_a_canvas_serves_every_size():
    scores = random_scores(5, 9, 12)
    traces = []

    @jax.jit
    def on_canvas(scores, size):
        traces.append(size)
        return label_map(scores, size, canvas=(64, 64))

    for height, width in SIZES:
        labels = on_canvas(scores, np.array([height, width]))
        found = np.asarray(labels[:height, :width])
        assert_same_labels(found, torch_labels(scores, (height, width)), scores, error=0)
    assert len(traces) == 1


def test_classes_that_are_not_present_do_not_compete():
    scores = random_scores(6, 5, 4)
    program = jax.jit(lambda scores, present: label_map(scores, (40, 32), present=present))
    for present in ([0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]):
        present = np.array(present, bool)
        labels = np.asarray(program(scores, present))
        assert set(np.unique(labels)) <= set(np.flatnonzero(present))
        assert_same_labels(labels, torch_labels(scores, (40, 32), present), scores[present], error=0)


def test_ties_go_to_the_earlier_class():
    low, high = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    np.testing.assert_array_equal(label_map(jnp.asarray([low, high, high, low]), (4, 4)), np.full((4, 4), 1))
    np.testing.assert_array_equal(label_map(jnp.zeros((3, 2, 2)), (4, 4)), np.zeros((4, 4)))


def test_scores_may_be_negative():
    scores = random_scores(4, 3, 3) - 10
    labels = np.asarray(label_map(jnp.asarray(scores), (20, 20)))
    assert_same_labels(labels, torch_labels(scores, (20, 20)), scores, error=0)


def test_memory_does_not_grow_with_the_number_of_classes():
    scores = jax.ShapeDtypeStruct((50, 64, 64), jnp.float32)
    assert largest_array(lambda scores: label_map(scores, (512, 512)), scores) == 512 * 512


@pytest.mark.parametrize(("classes", "size"), [(1, (10, 20)), (8, (256, 257)), (9, (300, 130))])
def test_labels_on_the_host_are_cut_to_the_images_size(classes, size):
    scores = random_scores(classes, 6, 8) - 10  # so that rows which only fill up would win
    labels = upsampled_labels(scores, size)
    assert labels.shape == size
    assert_same_labels(np.asarray(labels), torch_labels(scores, size), scores, error=0)


def test_rows_are_padded_to_the_next_multiple_of_eight():
    assert [padded_rows(classes) for classes in (1, 7, 8, 9, 150)] == [8, 8, 8, 16, 152]


@pytest.mark.parametrize(("source", "target"), [(6, 60), (64, 1000), (12, 5), (7, 7), (1, 9)])
def test_the_bilinear_matrix_is_torchs_interpolation_of_a_line(source, target):
    line = np.random.default_rng(0).standard_normal(source).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(line)[None, None], size=target, mode="linear", align_corners=False)[0, 0]
    matrix = np.asarray(bilinear_matrix(source, target, target + 3))
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)
    assert relative_error(matrix[:target] @ line, expected) <= 1e-5
    np.testing.assert_array_equal(matrix[target:], np.broadcast_to(np.eye(source)[-1], (3, source)))


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_a_classes_score_is_the_mean_of_its_tokens_columns():
    maps = np.random.default_rng(0).random((2, 5, 11), dtype=np.float32)
    spans = (TokenSpan(1, 2), TokenSpan(2, 5), TokenSpan(1, 3))
    prompts = ClassPrompts(("cat", "a b c", "d e"), ("cat a b c", "d e"), (0, 1, 2), (0, 0, 1), spans, length=11)
    scores = class_scores(jnp.asarray(maps), jnp.asarray(prompts.averaging(4)))
    expected = np.zeros((2, 4, 5), np.float32)
    for index, (prompt, (start, stop)) in enumerate(zip(prompts.prompt_of_name, spans, strict=True)):
        for image_token in range(5):
            expected[prompt, index, image_token] = np.mean([maps[prompt, image_token, t] for t in range(start, stop)])
    assert relative_error(np.asarray(scores), expected) <= 1e-6


def test_an_images_prompts_stand_side_by_side_unchanged():
    # Prompts 0 and 3 are image 1's, 2 is image 0's, 1 is image 2's; a class is scored by one prompt of its image.
    scores = np.zeros((4, 3, 6), np.float32)
    rows = np.random.default_rng(0).random((6, 6), dtype=np.float32)
    scores[0, 0], scores[0, 1], scores[3, 2], scores[2, 0], scores[2, 1], scores[1, 0] = rows
    images = np.array([1, 2, 0, 1])
    combined = np.asarray(combine_prompts(jnp.asarray(scores), jnp.asarray(images), 3))
    expected = np.zeros((3, 3, 6), np.float32)
    for prompt, image in enumerate(images):
        expected[image] += scores[prompt]
    np.testing.assert_array_equal(combined, expected)
    np.testing.assert_array_equal(combined[1], rows[:3])
