"""Focal and dice loss equal their PyTorch statements, mask by mask; rows without a mask count for nothing."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from seg4diff_jax.bilinear import upsampler
from seg4diff_jax.magnet.losses import class_losses, dice_loss, focal_loss, mask_losses
from tests.reference import magnet as reference
from tests.reference.largest_array import largest_array
from tests.reference.magnet import Image, random_masks
from tests.reference.random_weights import relative_error

GRID, SIZE = (4, 6), (19, 24)
REAL = np.array([[True, False, True, True], [False, True, False, False], [False] * 4])


def normal(*shape: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.6, "gamma": 0.5}, {"gamma": 0.0}, {"focal": "release"}])
def test_focal_loss_and_its_gradient_are_torchs(options):
    logits, masks = normal(5, *SIZE), random_masks((5, *SIZE))
    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    plain = {name: value for name, value in options.items() if name != "focal"}
    release = options.get("focal") == "release"
    expected = torch.stack(
        [reference.focal(x, torch.tensor(m), release=release, **plain) for x, m in zip(theirs, masks, strict=True)]
    )
    expected.sum().backward()
    found = focal_loss(jnp.asarray(logits), jnp.asarray(masks), **options)
    gradient = jax.grad(lambda x: focal_loss(x, jnp.asarray(masks), **options).sum())(jnp.asarray(logits))
    assert found.shape == (5,)
    assert relative_error(found, expected) <= 1e-6
    assert relative_error(gradient, theirs.grad) <= 1e-6


def test_dice_loss_is_torchs_and_zero_for_a_perfect_prediction():
    probs, masks = np.abs(normal(3, *SIZE)) % 1, random_masks((3, *SIZE))
    expected = [reference.dice(torch.tensor(p), torch.tensor(m)) for p, m in zip(probs, masks, strict=True)]
    assert relative_error(dice_loss(jnp.asarray(probs), jnp.asarray(masks)), torch.stack(expected)) <= 1e-6
    np.testing.assert_array_equal(dice_loss(jnp.asarray(masks, jnp.float32), jnp.asarray(masks)), np.zeros(3))


@pytest.mark.parametrize(("focal", "largest"), [("sigmoid", 1e30), ("release", 1e10)])
def test_losses_and_gradients_are_finite_for_extreme_logits(focal, largest):
    extremes = [0.0, 1e-38, 50.0, 88.0, 89.0, 104.0, 1e4, largest]
    logits = jnp.array([extremes, [-x for x in extremes]]).reshape(1, 1, 4, 4)
    for masks in (jnp.zeros((1, 1, 8, 8), bool), jnp.ones((1, 1, 8, 8), bool)):
        loss = lambda x, masks=masks: sum(mask_losses(x, masks, jnp.ones((1, 1), bool), focal=focal))
        value, gradient = jax.value_and_grad(loss)(logits)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


def test_upsampling_is_torchs():
    maps = normal(3, *GRID)
    expected = torch.stack([reference.upsampled(torch.tensor(map_), SIZE) for map_ in maps])
    assert relative_error(upsampler(GRID, SIZE)(jnp.asarray(maps)), expected) <= 1e-6


@pytest.mark.parametrize("focal", ["sigmoid", "release"])
def test_mask_losses_are_the_sum_over_real_masks_over_their_number(focal):
    logits, masks = normal(3, 4, *GRID), random_masks((3, 4, *SIZE))
    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    chosen = list(zip(theirs[REAL], torch.tensor(masks[REAL]), strict=True))
    assert len(chosen) == 4
    predictions = [(reference.upsampled(map_, SIZE), mask) for map_, mask in chosen]
    expected = torch.stack(
        [
            torch.stack([reference.focal(x, mask, release=focal == "release") for x, mask in predictions]).mean(),
            torch.stack([reference.dice(torch.sigmoid(x), mask) for x, mask in predictions]).mean(),
        ]
    )
    (expected[0] + 10 * expected[1]).backward()

    @jax.jit
    def ours(logits):
        losses = mask_losses(logits, jnp.asarray(masks), jnp.asarray(REAL), focal=focal)
        return losses.focal + 10 * losses.dice, jnp.stack(losses)

    (_, found), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(logits))
    assert relative_error(found, expected) <= 1e-6
    assert relative_error(gradient, theirs.grad) <= 1e-6
    assert not np.any(np.asarray(gradient)[~REAL])


def test_a_batch_without_masks_has_no_loss_and_no_gradient():
    arrays = jnp.asarray(random_masks((2, 3, *SIZE))), jnp.zeros((2, 3), bool)
    for function in (mask_losses, class_losses):
        maps = jnp.abs(jnp.asarray(normal(2, 3, *GRID)))
        value, gradient = jax.value_and_grad(lambda maps, function=function: sum(function(maps, *arrays)))(maps)
        assert value == 0
        assert not np.any(gradient)


@pytest.mark.parametrize("function", [mask_losses, class_losses])
def test_memory_does_not_grow_with_the_number_of_masks(function):
    side, rows = 64, 16
    maps, masks = jnp.ones((1, rows, 8, 8)), jnp.ones((1, rows, side, side), bool)
    loss = lambda maps: sum(function(maps, masks, jnp.ones((1, rows), bool)))
    compiled = jax.jit(jax.grad(loss)).lower(maps).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < rows * side * side * 4


# ---- log_probs ------------------------------------------------------------------------------------------------------


def class_case(gamma: float = 2.0):
    """Scores of up to four classes in three images, the last of which has none, and the reference's losses."""
    probs, masks = np.abs(normal(3, 4, *GRID)) / 50 + 1e-5, random_masks((3, 4, *SIZE), seed=3)
    theirs = torch.tensor(probs, dtype=torch.float64, requires_grad=True)
    images = []
    for image in range(2):
        rows = np.flatnonzero(REAL[image]).tolist()
        maps = theirs[image].flatten(1).T[None]
        images.append(Image(maps, torch.tensor(masks[image, rows]), [[row] for row in rows]))
    return probs, masks, theirs, reference.class_losses(images, GRID, gamma=gamma)


@pytest.mark.parametrize("gamma", [2.0, 0.0])
def test_class_losses_are_torchs_log_softmax_over_the_prompts_classes(gamma):
    probs, masks, theirs, expected = class_case(gamma)
    (expected["focal"] + 10 * expected["dice"]).backward()

    def ours(probs):
        losses = class_losses(probs, jnp.asarray(masks), jnp.asarray(REAL), gamma=gamma)
        return losses.focal + 10 * losses.dice, losses

    (_, found), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(probs))
    assert float(found.focal) == pytest.approx(expected["focal"].item(), rel=1e-6)
    assert float(found.dice) == pytest.approx(expected["dice"].item(), rel=1e-6)
    assert relative_error(gradient, theirs.grad) <= 1e-5
    assert np.abs(np.asarray(gradient)[0, 0]).max() > 0


def test_without_focusing_the_class_loss_is_cross_entropy_of_labelled_pixels():
    labels = np.random.default_rng(0).integers(-1, 3, SIZE)  # -1: no class
    probs = np.abs(normal(1, 3, *GRID)) + 1e-3
    masks = labels == np.arange(3)[:, None, None]
    scores = torch.stack([reference.upsampled(torch.tensor(map_), SIZE) for map_ in probs[0]])
    expected = torch.nn.functional.cross_entropy(scores.log()[None], torch.tensor(labels)[None], ignore_index=-1)
    found = class_losses(jnp.asarray(probs), jnp.asarray(masks)[None], jnp.ones((1, 3), bool), gamma=0.0)
    assert float(found.focal) == pytest.approx(float(expected), rel=1e-6)


def test_one_class_alone_and_vanishing_probabilities_leave_gradients_finite():
    probs = jnp.asarray(np.abs(normal(2, 2, *GRID))).at[1, 0].set(0.0).at[1, 1].set(1e-38)
    masks = jnp.asarray(random_masks((2, 2, *SIZE)))
    real = jnp.array([[True, False], [True, True]])
    for gamma in (0.0, 1.0, 2.0):
        loss = partial(class_losses, masks=masks, real=real, gamma=gamma)
        value, gradient = jax.value_and_grad(lambda probs, loss=loss: sum(loss(probs)))(probs)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
    alone = class_losses(probs[:1], masks[:1], real[:1])
    assert float(alone.focal) == 0
    assert float(alone.dice) == pytest.approx(0, abs=1e-6)


def test_a_scale_common_to_all_classes_changes_no_class_loss():
    probs, masks, *_ = class_case()
    first, second = (
        class_losses(factor * jnp.asarray(probs), jnp.asarray(masks), jnp.asarray(REAL)) for factor in (1, 1e-3)
    )
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_largest_array_of_mask_losses_is_the_masks():
    masks = jax.ShapeDtypeStruct((2, 8, 64, 64), bool)
    maps, real = jax.ShapeDtypeStruct((2, 8, 8, 8), jnp.float32), jax.ShapeDtypeStruct((2, 8), bool)
    assert largest_array(mask_losses, maps, masks, real) == 2 * 8 * 64 * 64
