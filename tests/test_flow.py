"""The noise schedule is diffusers'; noising and the velocity follow from their definitions."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from seg4diff_jax.batching import one_for_each
from seg4diff_jax.flow import FlowSchedule, add_noise, check_seed, image_noise, velocity_target
from tests.reference.random_weights import relative_error

SHAPE = (4, 6, 3)


def diffusers_schedule(shift: float, steps: int) -> Any:
    schedule = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    schedule.set_timesteps(steps)
    return schedule


def a_batch(seed: int, batch: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, *SHAPE), dtype=np.float32))


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
@pytest.mark.parametrize("steps", [1, 2, 28, 50, 1000])
def test_sigmas_and_timesteps_are_those_of_diffusers(shift, steps):
    theirs = diffusers_schedule(shift, steps)
    sigmas = FlowSchedule(shift).sigmas(steps)
    assert relative_error(sigmas, theirs.sigmas[:-1]) <= 1e-6
    assert relative_error(1000 * sigmas, theirs.timesteps) <= 1e-6
    assert theirs.sigmas[-1] == 0


def test_the_papers_noise_level_is_the_eighth_of_28_from_the_clean_end():
    schedule = FlowSchedule(3.0)
    assert 1000 * schedule.sigma_at(8) == pytest.approx(515.072, abs=5e-4)
    assert [round(1000 * sigma, 3) for sigma in schedule.sigmas()[[0, 1, 2, -1]]] == [1000.0, 987.381, 974.108, 8.929]
    assert schedule.sigma_at(28) == 1
    assert schedule.sigma_at(3, steps=10) == schedule.sigmas(10)[7]


def test_the_schedule_is_read_from_diffusers_config():
    written = dict(FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).config)
    assert FlowSchedule.from_json(written) == FlowSchedule(3.0)
    assert FlowSchedule.from_json({}) == FlowSchedule(FlowMatchEulerDiscreteScheduler().config["shift"])


@pytest.mark.parametrize(
    "option",
    [
        {"use_dynamic_shifting": True},
        {"invert_sigmas": True},
        {"num_train_timesteps": 500},
    ],
)
def test_a_schedule_of_another_kind_is_refused_by_name_and_value(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"scheduler's {name} is {value!r}"):
        FlowSchedule.from_json({"shift": 3.0, "num_train_timesteps": 1000} | option)


def test_steps_outside_the_schedule_are_refused():
    schedule = FlowSchedule()
    for step, steps in ((0, 28), (29, 28), (-8, 28)):
        message = rf"step is {step}; expected a whole number, 1 \(nearly clean\) to {steps} \(pure noise\)"
        with pytest.raises(ValueError, match=message):
            schedule.sigma_at(step, steps)
    for steps in (0, 1001, True):
        with pytest.raises(ValueError, match=f"steps is {steps}; expected a whole number, 1 to 1000"):
            schedule.sigmas(steps)


@pytest.mark.parametrize("step", [1, 8, 28])
def test_noised_latents_are_those_of_diffusers(step):
    theirs = diffusers_schedule(3.0, 28)
    latents, noise = a_batch(0), a_batch(1)
    expected = theirs.scale_noise(
        torch.from_numpy(np.array(latents)), theirs.timesteps[-step][None], torch.from_numpy(np.array(noise))
    )
    ours = add_noise(latents, noise, FlowSchedule(3.0).sigma_at(step))
    assert relative_error(np.asarray(ours), expected) <= 1e-6


def test_noising_runs_from_the_latents_to_the_noise_along_the_velocity():
    latents, noise = a_batch(0), a_batch(1)
    np.testing.assert_array_equal(add_noise(latents, noise, 0.0), latents)
    np.testing.assert_array_equal(add_noise(latents, noise, 1.0), noise)
    _, slope = jax.jvp(lambda sigma: add_noise(latents, noise, sigma), (jnp.float32(0.3),), (jnp.float32(1),))
    np.testing.assert_allclose(velocity_target(latents, noise), slope, rtol=1e-6)
    np.testing.assert_array_equal(velocity_target(latents, noise), np.asarray(noise) - np.asarray(latents))


def test_one_step_along_the_velocity_leads_back_to_the_latents():
    latents, noise = a_batch(0), a_batch(1)
    noisy = add_noise(latents, noise, 0.515)
    np.testing.assert_allclose(noisy - 0.515 * velocity_target(latents, noise), latents, atol=1e-6)


def test_an_images_noise_depends_on_the_seed_and_its_index_alone():
    many = np.asarray(image_noise(7, [5, 0, 3], SHAPE))
    assert many.dtype == np.float32
    for row, index in zip(many, (5, 0, 3), strict=True):
        np.testing.assert_array_equal(image_noise(7, [index], SHAPE)[0], row)
    np.testing.assert_array_equal(image_noise(7, np.array([3, 5]), SHAPE), many[[2, 0]])
    np.testing.assert_array_equal(image_noise(7, range(1), SHAPE), many[1:2])
    assert not np.array_equal(image_noise(8, [5], SHAPE)[0], many[0])


def test_each_further_view_of_an_image_has_noise_of_its_own_and_the_first_is_the_only_ones():
    views = [np.asarray(image_noise(7, [5, 0], SHAPE, view)) for view in range(4)]
    np.testing.assert_array_equal(views[0], image_noise(7, [5, 0], SHAPE))
    flat = np.stack([view.reshape(2, -1) for view in views]).reshape(8, -1)
    correlation = np.corrcoef(flat) - np.eye(8)
    assert np.abs(correlation).max() < 5 / np.sqrt(flat.shape[1])
    np.testing.assert_array_equal(image_noise(7, [0], SHAPE, 3)[0], views[3][1])


def test_noise_is_standard_normal_and_independent_between_images():
    first, second = np.asarray(image_noise(0, [0, 1], (64, 64, 4)))
    assert abs(first.mean()) < 0.05
    assert abs(first.std() - 1) < 0.05
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05


def test_every_seed_in_range_has_noise_of_its_own_and_others_are_refused():
    seeds = (0, 1, 2**31, 2**31 + 1, 2**32 - 1)
    noises = [np.asarray(image_noise(seed, [0], SHAPE)) for seed in seeds]
    for first, second in itertools.combinations(noises, 2):
        assert not np.array_equal(first, second)
    for seed in (-1, 2**32, 2**64, 2**100):
        with pytest.raises(ValueError, match=f"seed is {seed}; expected a whole number, 0 to 4294967295"):
            image_noise(seed, [0], SHAPE)


def test_whole_numbers_are_pythons_and_numpys_and_no_truth_values(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users: types are checked in tests only
    schedule = FlowSchedule()
    assert schedule.sigma_at(np.int64(8)) == schedule.sigma_at(8)
    assert check_seed(np.uint32(7)) == 7
    assert one_for_each(["a"], np.int32(2)) == ["a", "a"]
    for value in (True, 8.0, "8", np.bool_(True), None):
        with pytest.raises(ValueError, match=f"step is {value!r}; expected a whole number"):
            schedule.sigma_at(value)
        with pytest.raises(ValueError, match=f"seed is {value!r}; expected a whole number"):
            check_seed(value)
        with pytest.raises(ValueError, match=f"images_per_prompt is {value!r}; expected a whole number"):
            one_for_each(["a"], value)
