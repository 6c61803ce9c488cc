"""Noise levels to train at, and the velocity's error, against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seg4diff_jax.flow import FlowSchedule, add_noise, logit_normal_sigmas, velocity_loss, velocity_target


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.5, 0.8, 1.0), (0.0, 0.5, 3.0)])
def test_noise_levels_have_the_quantiles_of_a_shifted_logit_normal(mean, std, shift):
    sigmas = np.sort(np.asarray(logit_normal_sigmas(jax.random.key(0), 40_000, mean=mean, std=std, shift=shift)))
    normal_quantiles = np.array([-1.2815516, -0.6744898, 0.0, 0.6744898, 1.2815516])
    level = 1 / (1 + np.exp(-(mean + std * normal_quantiles)))
    expected = shift * level / (1 + (shift - 1) * level)
    np.testing.assert_allclose(np.quantile(sigmas, [0.1, 0.25, 0.5, 0.75, 0.9]), expected, atol=0.01)
    assert 0 < sigmas[0] < sigmas[-1] < 1


def test_the_shift_of_noise_levels_is_that_of_the_schedule():
    unshifted, shifted = (logit_normal_sigmas(jax.random.key(1), 50, shift=shift) for shift in (1.0, 3.0))
    np.testing.assert_allclose(shifted, FlowSchedule(shift=3.0)._shifted(np.asarray(unshifted)), rtol=1e-6)


def test_each_image_has_its_own_noise_level_and_loss():
    latents, noise = jax.random.normal(jax.random.key(2), (2, 3, 4, 5, 6))
    sigma = jnp.array([0.0, 0.4, 1.0])
    noisy = add_noise(latents, noise, sigma)
    for image in range(3):
        np.testing.assert_array_equal(noisy[image], add_noise(latents, noise, sigma[image])[image])
    target = velocity_target(latents, noise)
    errors = np.array([0.0, 1.0, 2.0])
    predicted = target + errors[:, None, None, None]
    np.testing.assert_allclose(velocity_loss(predicted, target), errors**2, atol=1e-6)
