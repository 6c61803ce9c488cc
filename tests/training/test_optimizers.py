"""AdamW, Muon and their schedules against PyTorch and closed forms."""

from __future__ import annotations

import math
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from seg4diff_jax.miniature.autoencoder import Objective as AutoencoderObjective
from seg4diff_jax.miniature.flow_matching import Evaluation
from seg4diff_jax.miniature.flow_matching import Objective as FlowObjective
from seg4diff_jax.models.lora import LoRAConfig
from seg4diff_jax.training.optimizers import BOUNDS, OptimizerConfig, average_decay, make_optimizer, make_schedule
from seg4diff_jax.training.sample_pictures import Samples

STEPS = 40


def make_gradients(steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"a.kernel": rng.normal(size=(3, 2)), "a.bias": rng.normal(size=2)} for _ in range(steps)]


def test_updates_equal_pytorch_adamw_with_clipping_and_decay_of_matrices_only():
    config = OptimizerConfig(
        learning_rate=0.03, schedule="constant", weight_decay=0.2, betas=(0.8, 0.95), clip=1.5, epsilon=1e-6
    )
    gradients = make_gradients(10)
    parameters = {name: jnp.asarray(array, jnp.float32) for name, array in make_gradients(1)[0].items()}
    theirs = {name: torch.nn.Parameter(torch.from_numpy(np.array(array))) for name, array in parameters.items()}
    groups = [
        {"params": [theirs["a.kernel"]], "weight_decay": 0.2},
        {"params": [theirs["a.bias"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.03, betas=(0.8, 0.95), eps=1e-6)
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(parameters)
    for gradient in gradients:
        ours = {name: jnp.asarray(array, jnp.float32) for name, array in gradient.items()}
        updates, state = optimizer.update(ours, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        for name, array in gradient.items():
            theirs[name].grad = torch.from_numpy(array.astype(np.float32))
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.5)
        adamw.step()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(parameters[name], tensor.detach().numpy(), rtol=2e-5, atol=1e-6)


def rates(**settings) -> np.ndarray:
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **settings), STEPS)
    return np.array([float(schedule(step)) for step in range(STEPS)])


def nearly_orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Muon's five steps by Newton and Schulz, seen on the singular values: each goes through one polynomial."""
    left, singular, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    singular /= np.linalg.norm(singular)
    for _ in range(5):
        singular = 3.4445 * singular - 4.775 * singular**3 + 2.0315 * singular**5
    return left * singular @ right


def test_muon_orthogonalises_every_matrix_of_a_stack_and_adam_keeps_the_rest():
    rate, steps = 0.05, 4
    rng = np.random.default_rng(0)
    shapes = {"blocks.kernel": (2, 6, 10), "blocks.bias": (2, 10), "head.kernel": (4, 3)}
    gradient = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    parameters = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    optimizer = make_optimizer(OptimizerConfig(rate, "constant", clip=None, muon="blocks.*kernel"), steps)
    plain = make_optimizer(OptimizerConfig(rate, "constant", clip=None), steps)
    state, plain_state = optimizer.init(parameters), plain.init(parameters)
    expected = np.stack([-rate * 0.2 * math.sqrt(10) * nearly_orthogonal(each) for each in gradient["blocks.kernel"]])
    for _ in range(steps):  # the momentum of one and the same gradient is along it
        updates, state = optimizer.update(gradient, state, parameters)
        adam, plain_state = plain.update(gradient, plain_state, parameters)
        np.testing.assert_array_equal(updates["head.kernel"], adam["head.kernel"])
        np.testing.assert_array_equal(updates["blocks.bias"], adam["blocks.bias"])
        np.testing.assert_allclose(updates["blocks.kernel"], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("pattern", ["nothing", "bias"])
def test_muon_refuses_what_is_no_matrix(pattern):
    optimizer = make_optimizer(OptimizerConfig(muon=pattern), STEPS)
    with pytest.raises(ValueError, match="expected to match matrices and nothing else"):
        optimizer.init({"a.kernel": jnp.zeros((3, 2)), "a.bias": jnp.zeros(2)})


def test_schedules_have_their_closed_forms():
    steps = np.arange(STEPS)
    np.testing.assert_allclose(rates(schedule="constant"), 2)
    np.testing.assert_allclose(rates(schedule="cosine"), 1 + np.cos(np.pi * steps / STEPS), atol=1e-6)
    late = np.minimum(2, 2 * (STEPS - steps) / (STEPS / 4))
    np.testing.assert_allclose(rates(schedule="last_quarter"), late, atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "last_quarter"])
def test_a_warmup_rises_in_equal_steps_to_the_full_rate(schedule):
    np.testing.assert_allclose(rates(schedule=schedule, warmup=4)[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)


def test_detectron2s_warmup_meets_a_cosine_that_counts_from_the_start():
    found = rates(schedule="detectron2", warmup=10)
    cosine = [1 + math.cos(math.pi * step / STEPS) for step in range(STEPS)]
    np.testing.assert_allclose(found[10:], cosine[10:], atol=1e-6)
    np.testing.assert_allclose(found[:10], np.linspace(0.02, cosine[10], 11)[:10], rtol=1e-5)


def test_groups_of_parameters_have_rates_of_their_own():
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", clip=None, rates={"slow": 0.1, "still": 0.0})
    parameters = {name: jnp.zeros(2) for name in ("a.kernel", "slow.kernel", "still.bias")}
    optimizer = make_optimizer(config, 1)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, parameters), optimizer.init(parameters), parameters)
    steps = {name: float(update[0]) for name, update in updates.items()}
    assert steps == pytest.approx({"a.kernel": -1, "slow.kernel": -0.1, "still.bias": 0}, rel=1e-5)
    with pytest.raises(ValueError, match="no trained parameter's name holds 'absent'"):
        make_optimizer(OptimizerConfig(rates={"absent": 2.0}), 1).init(parameters)


def test_the_average_begins_quickly_and_ends_at_its_decay():
    config = OptimizerConfig(average=0.9)
    assert float(average_decay(config, jnp.int32(1))) == pytest.approx(2 / 11)
    assert float(average_decay(config, jnp.int32(500))) == pytest.approx(0.9)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup is 40; expected less than the run's 40 steps"):
        rates(warmup=40)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("learning_rate", [0.0, -1e-4, math.nan, math.inf, 1e39, 1e-46]),  # the last two are inf and 0 in 32 bits
        ("warmup", [-1]),
        ("weight_decay", [-0.1, math.nan, math.inf]),
        ("betas", [(1.0, 0.999), (0.9, math.nan), (-0.1, 0.9), (0.9, math.inf)]),
        ("epsilon", [0.0, -1e-8, math.nan, math.inf, 1e-46]),
        ("clip", [0.0, -1.0, math.nan, math.inf]),
        ("accumulate", [0, -1]),
        ("average", [1.0, -0.1, math.nan, math.inf]),
        ("rates", [{"kernel": math.nan}, {"a": 1.0, "kernel": math.inf}, {"kernel": -1.0}]),
    ],
)
def test_numbers_beyond_an_options_bounds_are_refused_by_its_name(option, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^optimizer\.{option}.* is .*; expected "):
            OptimizerConfig(**{option: value})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("kind", "option", "several"),
    [
        (FlowObjective, "std", False),
        (FlowObjective, "caption_dropout", False),
        (Evaluation, "sigmas", True),
        (AutoencoderObjective, "edges", False),
        (Samples, "guidance", False),
        (LoRAConfig, "alpha", False),
    ],
)
def test_numbers_of_tasks_that_are_not_finite_are_refused_in_python_too(kind, option, several, number):
    with pytest.raises(ValueError, match=rf"{option} is .*; expected a (finite )?number"):
        kind(**{option: (0.5, number) if several else number})


def test_every_number_of_the_options_has_bounds():
    names = {field.name for field in fields(OptimizerConfig)}
    assert names - BOUNDS.keys() == {"schedule", "muon"}, "those that are no numbers"
