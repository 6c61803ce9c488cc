"""Principal components, against LAPACK's decomposition of whole matrices in fp64 and features of blocks in PyTorch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from seg4diff_jax.analysis.principal_components import (
    MOST_ITERATIONS,
    block_components,
    leading_directions,
    principal_components,
)
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.passes import NoisedImages
from tests.reference.attention import explicit_softmax
from tests.reference.largest_array import largest_array
from tests.reference.mmdit import SMALL, VARIANTS, make_inputs, make_pair, run_torch

IMAGE, TEXT = 48, 11


def decaying(tokens: int, dim: int, batch: int = 2, decay: float = 0.7) -> np.ndarray:
    """Random features about a random mean, whose singular values fall by a factor each."""
    rng = np.random.default_rng(tokens + dim)
    rank = min(tokens, dim)
    left = np.linalg.qr(rng.standard_normal((batch, tokens, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((batch, dim, rank)))[0]
    features = 30 * (left * decay ** np.arange(rank)) @ right.mT
    return (features + rng.standard_normal((batch, 1, dim))).astype(np.float32)


def check(scores: np.ndarray, explained: np.ndarray, features: np.ndarray) -> None:
    """Compares with the singular value decomposition of [tokens, dim] features, up to the sign.

    An error of the features turns a component by that over the distance to the next singular value. So what may differ
    is 1e-5 of the largest score, as for any small array, times the first singular value over that distance.
    """
    count = scores.shape[-1]
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    true = min(count, len(centred) - 1, features.shape[1])  # centred features have one rank less
    left, values = left[:, :true], np.append(values, 0)
    expected = left * values[:true] * np.where(np.take_along_axis(left, np.abs(left).argmax(0)[None], 0) < 0, -1, 1)
    gaps = np.abs(np.diff(np.append(np.inf, values)))
    allowed = 1e-5 * values[0] / np.minimum(gaps[:-1], gaps[1:])[:true]
    assert allowed.max() < 1e-2, "components are too close to each other to be compared"
    found = scores[:, :true]
    either = np.minimum(np.abs(found - expected).max(axis=0), np.abs(found + expected).max(axis=0))
    assert (either <= allowed * np.abs(expected).max(initial=0)).all(), either / np.abs(expected).max()
    np.testing.assert_allclose(explained[:true], np.square(values[:true]) / np.square(values).sum(), atol=1e-5)
    assert not scores[:, true:].any()
    assert not explained[true:].any()


@pytest.mark.parametrize(("tokens", "dim"), [(200, 150), (60, 130), (40, 9), (9, 40), (5, 3), (2, 7), (1, 6), (7, 1)])
def test_components_are_those_of_the_singular_value_decomposition(tokens, dim):
    features = decaying(tokens, dim)
    found = jax.tree.map(np.asarray, principal_components(jnp.asarray(features)))
    for image in range(2):
        if tokens > 1:
            check(found.scores[image], found.explained[image], features[image])
        assert np.isfinite(found.scores[image]).all()
    assert (found.explained >= 0).all()
    assert (found.explained.sum(-1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("count", [1, 5, 20])
def test_as_many_components_as_are_asked(count):
    features = decaying(70, 90, decay=0.9)
    found = principal_components(jnp.asarray(features), count)
    check(np.asarray(found.scores[1]), np.asarray(found.explained[1]), features[1])


def test_the_score_of_largest_magnitude_is_positive():
    scores = np.asarray(principal_components(jnp.asarray(decaying(60, 40))).scores)
    np.testing.assert_array_equal(scores.max(axis=1), np.abs(scores).max(axis=1))


def test_a_joint_basis_is_of_all_images_together():
    features = decaying(30, 40, batch=3)
    joint = jax.tree.map(np.asarray, principal_components(jnp.asarray(features), joint=True))
    check(joint.scores.reshape(90, 3), joint.explained[0], features.reshape(90, 40))
    np.testing.assert_array_equal(joint.explained, joint.explained[[0, 0, 0]])
    assert np.abs(joint.scores.mean(axis=1)).max() > 1, "images differ in their mean"
    one = jnp.asarray(features[:1])
    same = functools.partial(np.testing.assert_allclose, atol=1e-5 * 30)
    jax.tree.map(same, principal_components(one, joint=True), principal_components(one))


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    features = np.concatenate([decaying(40, 50), np.random.default_rng(0).standard_normal((1, 40, 50), np.float32)])
    alone = [principal_components(jnp.asarray(features[image : image + 1])) for image in range(3)]
    together = principal_components(jnp.asarray(features))
    for image in range(2):  # the third one's components are too close to each other for such a bound
        np.testing.assert_allclose(alone[image].scores[0], together.scores[image], atol=1e-5 * 30)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("shape", [(2, 300, 40), (1, 4, 8), (2, 1, 1)])
def test_features_that_are_the_same_everywhere_have_zeros_for_components(shape, joint):
    constant = np.broadcast_to(np.linspace(-3.3, 70.7, shape[-1], dtype=np.float32), shape)
    found = principal_components(jnp.asarray(constant), joint=joint)
    assert not np.asarray(found.scores).any()
    assert not np.asarray(found.explained).any()


def test_features_that_are_not_numbers_are_not_hidden():
    features = decaying(20, 30)
    features[0, 3, 5] = np.nan
    found = jax.tree.map(np.asarray, principal_components(jnp.asarray(features)))
    assert np.isnan(found.scores[0]).any()
    check(found.scores[1], found.explained[1], features[1])


def test_iterations_end_when_the_leading_directions_rest_or_at_the_maximum():
    iterations = lambda features: int(leading_directions(jnp.asarray(features), 3, jnp.float32(0))[1])
    assert 2 < iterations(decaying(90, 70)[0]) < 10
    assert iterations(np.zeros((30, 20), np.float32)) < 3
    flat = np.random.default_rng(0).standard_normal((300, 200), np.float32)
    flat -= flat.mean(axis=0)
    assert 10 < iterations(flat) <= MOST_ITERATIONS  # more than where directions stand out
    # Near-equal components are not told apart to the last digit, but no more variance is to be had.
    explained = np.asarray(principal_components(jnp.asarray(flat)[None]).explained[0])
    squares = np.square(np.linalg.svd(flat.astype(np.float64), compute_uv=False))
    np.testing.assert_allclose(explained, squares[:3] / squares.sum(), rtol=1e-4)


def seen(inputs: dict) -> tuple[NoisedImages, TextConditioning]:
    """What the model sees as it is: images that are all noise of their own, at noise levels of the timesteps."""
    return NoisedImages(inputs["latents"], inputs["latents"], inputs["timesteps"] / 1000), inputs["conditioning"]


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium"])
def test_components_of_every_block_are_those_of_its_features_in_pytorch(variant):
    theirs, ours = make_pair(VARIANTS[variant])
    inputs = make_inputs(VARIANTS[variant], (12, 16), text=TEXT)
    processors = explicit_softmax(theirs)
    with torch.no_grad():
        run_torch(theirs, inputs)
    alone, joint = (
        jax.tree.map(np.asarray, block_components(ours, *seen(inputs), joint=joint)) for joint in (False, True)
    )
    assert alone.scores.shape == (2, len(processors), 3, IMAGE, 3)
    assert alone.explained.shape == (2, len(processors), 3, 3)
    for block, processor in enumerate(processors):
        for projection, name in enumerate("qkv"):
            features = getattr(processor, name)[:, :, :IMAGE].transpose(1, 2).flatten(2).numpy()
            place = block, projection
            for image in range(2):
                check(alone.scores[image][place], alone.explained[image][place], features[image])
            scores = joint.scores[:, block, projection].reshape(2 * IMAGE, 3)
            check(scores, joint.explained[0][place], features.reshape(2 * IMAGE, -1))


def test_some_blocks_may_be_asked():
    _, ours = make_pair(SMALL)
    inputs = make_inputs(SMALL, (12, 16), text=TEXT)
    whole = block_components(ours, *seen(inputs), count=2)
    some = block_components(ours, *seen(inputs), blocks=(0, 2), count=2)
    np.testing.assert_allclose(some.explained, whole.explained[:, [0, 2]], rtol=1e-4)
    np.testing.assert_allclose(some.scores, whole.scores[:, [0, 2]], atol=1e-3)  # of 10: two programs may round apart


def test_components_cost_no_array_of_tokens_by_tokens():
    _, ours = make_pair(SMALL | {"pos_embed_max_size": 32})
    inputs = make_inputs(SMALL, (64, 64), text=TEXT)
    components = functools.partial(block_components, kernel=Kernel("xla", query_chunk=64))
    assert largest_array(components, ours, *seen(inputs)) < (32 * 32) ** 2
    # Many features and few tokens: no array of features by features either.
    assert largest_array(principal_components, jnp.zeros((1, 20, 500))) <= 20 * 500
