"""Predictions of masks: class maps by token places, matched maps by heads and tokens, the release's head on both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from scipy.optimize import linear_sum_assignment
from scipy.stats import kstest

from seg4diff_jax.magnet.targets import averaging_of_ids, class_maps, matched_maps
from seg4diff_jax.models.mask_head import MaskHead
from seg4diff_jax.text import ClassPrompts, TokenSpan
from tests.reference import magnet as reference
from tests.reference.magnet import ReleaseHead, carried, random_masks, release_head
from tests.reference.random_weights import relative_error
from tests.reference.ties import assert_one_best

GRID, HEADS, TEXT = (5, 6), 3, 9


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_mask_head_is_the_releases_three_convolutions_and_a_residual():
    theirs = release_head()
    names = [name for name, _ in theirs.named_parameters()]
    assert names == [f"attn_mlp.attn_score_layer.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    maps = normal(2, 4, 7, 5)
    with torch.no_grad():
        expected = torch.tensor(maps) + theirs(torch.tensor(maps).reshape(8, 1, 7, 5)).reshape(2, 4, 7, 5)
    assert relative_error(carried(theirs)(jnp.asarray(maps)), expected) <= 1e-6


def test_fresh_heads_are_trainable_parameters_of_that_shape():
    shapes = [
        variable.get_value().shape
        for _, variable in nnx.to_flat_state(nnx.state(MaskHead(rngs=nnx.Rngs(0)), nnx.Param))
    ]
    assert sorted(shapes) == sorted([(3, 3, 1, 64), (64,), (3, 3, 64, 64), (64,), (3, 3, 64, 1), (1,)])


def test_fresh_heads_begin_as_pytorchs_convolutions_do():
    """Of many heads: every layer's numbers lie within PyTorch's limits, and spread evenly over them."""
    torch.manual_seed(0)
    theirs = [[p.detach().numpy().ravel() for p in ReleaseHead().parameters()] for _ in range(40)]
    ours = [
        [np.asarray(each.get_value()).ravel() for layer in head.layers for each in (layer.kernel, layer.bias)]
        for head in (MaskHead(rngs=nnx.Rngs(seed)) for seed in range(40))
    ]
    for mine, torchs in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        found, expected = np.concatenate(mine), np.concatenate(torchs)
        assert found.shape == expected.shape
        assert kstest(found, expected).pvalue > 0.01


def test_a_classs_map_is_the_mean_of_its_span():
    prompts = ClassPrompts(
        ("cat", "traffic light"), ("cat traffic light",), (0, 1), (0, 0), (TokenSpan(1, 2), TokenSpan(2, 4)), TEXT
    )
    maps = normal(1, 30, TEXT)
    found = class_maps(jnp.asarray(maps), jnp.asarray(prompts.averaging(3)), GRID)
    expected = np.stack([maps[0, :, 1], maps[0, :, 2:4].mean(axis=1), np.zeros(30)]).reshape(1, 3, *GRID)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_the_head_refines_tokens_before_a_class_averages_them():
    theirs, maps = release_head(), normal(2, 30, TEXT)
    averaging = np.zeros((2, 2, TEXT), np.float32)
    averaging[:, 0, 1:4], averaging[:, 1, 4] = 1 / 3, 1
    with torch.no_grad():
        tokens = torch.tensor(maps).transpose(1, 2).reshape(2 * TEXT, 1, *GRID)
        refined = (tokens + theirs(tokens)).reshape(2, TEXT, *GRID)
        expected = torch.stack([refined[:, 1:4].mean(1), refined[:, 4]], 1)
    found = jax.jit(class_maps, static_argnums=2)(jnp.asarray(maps), jnp.asarray(averaging), GRID, carried(theirs))
    assert relative_error(found, expected) <= 1e-6


def test_the_releases_class_averages_every_place_of_its_names_ids():
    start, end, traffic, light, cat, far = 98, 99, 1, 2, 3, 4
    prompt = np.array([[start, traffic, light, light, cat, end, end], [start, cat, end, end, end, end, end]])
    names = np.array([[[traffic, light], [light, -1], [far, -1]], [[cat, -1], [-1, -1], [-1, -1]]])
    weights, found = averaging_of_ids(jnp.asarray(prompt), jnp.asarray(names))
    expected = np.zeros((2, 3, 7))
    for image, name in np.ndindex(2, 3):
        places = torch.isin(torch.tensor(prompt[image]), torch.tensor(names[image, name])).nonzero().flatten()
        expected[image, name, places] = 1 / max(1, len(places))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_array_equal(found, [[True, True, False], [True, False, False]])


def test_matched_maps_are_one_to_one_over_heads_and_tokens_and_only_they_have_gradients():
    scores, masks = 2 * normal(2, HEADS, 30, TEXT), random_masks((2, 4, 40, 44), seed=2)
    real = np.array([[True, True, False, True], [False, True, False, False]])
    arrays = jnp.asarray(masks), jnp.asarray(real)

    @jax.jit
    def ours(scores):
        found = matched_maps(scores, *arrays, GRID)
        return jnp.where(arrays[1][..., None, None], found, 0).sum(), found

    (_, found), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(scores))
    expected = np.zeros_like(scores)
    for image in range(2):
        rows = np.flatnonzero(real[image])
        maps = scores[image].transpose(0, 2, 1).reshape(HEADS * TEXT, *GRID)
        costs = reference.costs(torch.tensor(maps), torch.tensor(masks[image, rows]))
        assert_one_best(costs)
        chosen, of_row = linear_sum_assignment(costs)
        for map_, row in zip(chosen, rows[of_row], strict=True):
            np.testing.assert_array_equal(found[image, row], maps[map_])
            expected[image, map_ // TEXT, :, map_ % TEXT] = 1
    assert expected.sum() == 4 * 30
    np.testing.assert_array_equal(gradient, expected)


def test_maps_are_matched_as_the_head_refines_them():
    theirs, scores, masks = release_head(seed=2), 2 * normal(1, HEADS, 30, 40), random_masks((1, 3, 40, 44), seed=2)
    real = np.ones((1, 3), bool)
    maps = torch.tensor(scores[0]).transpose(1, 2).reshape(-1, *GRID)
    with torch.no_grad():
        refined = reference.refined(maps, theirs)
    costs = [reference.costs(each, torch.tensor(masks[0])) for each in (maps, refined)]
    assert linear_sum_assignment(costs[0])[0].tolist() != linear_sum_assignment(costs[1])[0].tolist()
    assert_one_best(costs[1])
    rows, columns = linear_sum_assignment(costs[1])
    found = matched_maps(jnp.asarray(scores), jnp.asarray(masks), jnp.asarray(real), GRID, carried(theirs))
    assert relative_error(found[0], refined[rows[np.argsort(columns)]]) <= 1e-6
