"""Low-rank adapters equal PEFT's: velocity, unmerged and merged, and gradients; the base stays what it was."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import SD3Transformer2DModel
from flax import nnx

from seg4diff_jax.models.lora import (
    IMAGE_ATTENTION,
    TEXT_ATTENTION,
    Adapter,
    LoRA,
    LoRAConfig,
    LoRALinear,
    add_lora,
    apply_lora,
    lora_state,
    merge_lora,
    remove_lora,
    set_lora_state,
)
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.trunk import attention_at
from tests.reference.mmdit import VARIANTS, forward, make_inputs, make_pair, run_torch
from tests.reference.peft_adapters import add_peft_adapters, factors
from tests.reference.random_weights import relative_error

CASES = {
    "the release's": ("sd3", LoRAConfig(rank=4, alpha=4.0)),
    "both streams": ("sd3", LoRAConfig(rank=3, alpha=7.5, targets=IMAGE_ATTENTION + TEXT_ATTENTION)),
    "two blocks, a second attention and an MLP": (
        "sd3.5-medium",
        LoRAConfig(2, 1.0, ("image.attention.k", "image.dual_attention.q", "image.mlp.down"), blocks=(1, 3)),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> tuple[SD3Transformer2DModel, MMDiT, LoRAConfig, dict, dict[str, Adapter]]:
    """PEFT's model, our base, configuration, inputs, PEFT's adapters."""
    variant, config = CASES[request.param]
    theirs, base = make_pair(VARIANTS[variant])
    layers = list(lora_state(add_lora(base, config, nnx.Rngs(0))))
    add_peft_adapters(theirs, config, layers)
    return theirs, base, config, make_inputs(VARIANTS[variant]), factors(theirs, layers, lambda weight: weight)


@pytest.fixture(scope="module")
def base() -> MMDiT:
    return make_pair(VARIANTS["sd3"])[1]


def random_adapters(mmdit: MMDiT, seed: int = 0) -> dict[str, Adapter]:
    rng = np.random.default_rng(seed)
    draw = lambda shape: (rng.standard_normal(shape) / 8).astype(np.float32)
    return {name: Adapter(draw(a.shape), draw(b.shape)) for name, (a, b) in lora_state(mmdit).items()}


def assert_same_arrays(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_velocity_equals_peft_unmerged_and_merged(case):
    theirs, base, config, inputs, adapters = case
    with torch.no_grad():
        expected = run_torch(theirs, inputs)
    adapted = apply_lora(base, config, adapters)
    plain = forward(base, inputs)[0]
    assert relative_error(plain, expected) > 1e-2  # the adapters matter
    assert relative_error(forward(adapted, inputs)[0], expected) <= 1e-5
    merged = merge_lora(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert relative_error(forward(merged, inputs)[0], expected) <= 1e-5


def test_gradients_of_a_and_b_equal_pytorchs(case):
    theirs, base, config, inputs, adapters = case
    target = np.random.default_rng(9).standard_normal(inputs["latents"].shape).astype(np.float32)
    theirs.zero_grad()
    (run_torch(theirs, inputs) - torch.tensor(target)).square().mean().backward()
    expected = factors(theirs, list(adapters), lambda weight: weight.grad)
    graph, lora, rest = nnx.split(apply_lora(base, config, adapters), LoRA, ...)

    @jax.jit
    def gradient(lora, rest):
        loss = lambda lora: jnp.square(nnx.merge(graph, lora, rest)(**inputs)[0] - target).mean()
        return jax.grad(loss)(lora)

    found = lora_state(nnx.merge(graph, gradient(lora, rest), rest))
    assert found.keys() == expected.keys()
    largest = max(np.abs(factor).max() for pair in expected.values() for factor in pair)
    for name, pair in expected.items():
        for ours, reference in zip(found[name], pair, strict=True):
            assert np.abs(np.asarray(ours) - reference).max() <= 1e-5 * largest, name


def test_fresh_adapters_are_gaussian_times_zero_and_change_no_bit(base):
    inputs = make_inputs(VARIANTS["sd3"])
    adapted = add_lora(base, LoRAConfig(rank=8), nnx.Rngs(0))
    np.testing.assert_array_equal(*(np.asarray(forward(model, inputs)[0]) for model in (base, adapted)))
    state = lora_state(adapted)
    assert state.keys() == {f"blocks.{i}.{target}" for i in range(4) for target in IMAGE_ATTENTION}
    a = np.stack([np.asarray(pair.a) for pair in state.values()])
    assert a.shape == (16, 48, 8)
    assert all(not np.any(pair.b) for pair in state.values())
    assert len({factor.tobytes() for factor in a}) == 16
    assert abs(a.mean()) < 0.005
    assert a.std() == pytest.approx(1 / 8, rel=0.03)


def test_base_parameters_keep_their_names_and_arrays(base):
    adapted = add_lora(base, LoRAConfig(rank=2), nnx.Rngs(0))
    _, lora, rest = nnx.split(adapted, LoRA, ...)
    before, after = (dict(nnx.to_flat_state(state)) for state in (nnx.state(base), rest))
    assert before.keys() == after.keys()
    assert all(after[path].get_value() is variable.get_value() for path, variable in before.items())
    shapes = {".".join(map(str, path)): v.get_value().shape for path, v in nnx.to_flat_state(lora)}
    assert shapes["stacks.0.image.attention.q.lora_a"] == (3, 48, 2)
    assert shapes["stacks.1.image.attention.out.lora_b"] == (1, 2, 48)
    assert len(shapes) == 2 * 2 * 4
    assert isinstance(base.stacks[0].image.attention.q, nnx.Linear)  # the argument is as it was


def test_an_optimizer_of_the_adapters_holds_no_state_of_the_base_and_trains_chosen_blocks_only(base):
    adapted = add_lora(base, LoRAConfig(rank=2, targets=("image.attention.q",), blocks=(0, 2)), nnx.Rngs(0))
    optimizer = nnx.Optimizer(adapted, optax.adamw(1e-2), wrt=LoRA)
    inputs = make_inputs(VARIANTS["sd3"], (4, 4), text=3, batch=1)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.square(model(**inputs)[0]).mean()
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LoRA))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(adapted, optimizer)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert {array.ndim and array.shape[-2:] for array in jax.tree.leaves(nnx.state(optimizer))} == {0, (48, 2), (2, 48)}
    assert_same_arrays(remove_lora(adapted), base)
    layer = adapted.stacks[0].image.attention.q
    assert isinstance(layer, LoRALinear)
    for factor in (layer.lora_a.get_value(), layer.lora_b.get_value()):
        assert [bool(np.any(row)) for row in np.asarray(factor)] == [True, False, True]
    assert list(lora_state(adapted)) == ["blocks.0.image.attention.q", "blocks.2.image.attention.q"]


def test_adapters_can_be_removed_to_the_bit(base):
    config = LoRAConfig(rank=3, alpha=2.0, targets=IMAGE_ATTENTION + TEXT_ATTENTION)
    adapted = add_lora(base, config, nnx.Rngs(0))
    adapted = set_lora_state(adapted, random_adapters(adapted))
    assert_same_arrays(remove_lora(adapted), base)


def test_adapters_are_fp32_on_a_bf16_base(base):
    half = MMDiT(base.config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    values = jax.tree.map(lambda array: array.astype(jnp.bfloat16), nnx.state(base))
    nnx.update(half, values)
    config = LoRAConfig(rank=4)
    adapters = random_adapters(add_lora(base, config, nnx.Rngs(0)))
    adapted = apply_lora(half, config, adapters)
    assert {array.dtype for pair in lora_state(adapted).values() for array in pair} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(
        lora_state(adapted)["blocks.3.image.attention.v"].b, adapters["blocks.3.image.attention.v"].b
    )
    inputs = make_inputs(VARIANTS["sd3"])
    exact = forward(apply_lora(base, config, adapters), inputs)[0]
    rounding = relative_error(forward(half, inputs)[0].astype(jnp.float32), forward(base, inputs)[0])
    velocity = forward(adapted, inputs)[0]
    assert velocity.dtype == jnp.bfloat16
    assert relative_error(velocity.astype(jnp.float32), exact) <= 2 * rounding
    merged = merge_lora(adapted)
    assert {array.dtype for array in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert relative_error(forward(merged, inputs)[0].astype(jnp.float32), exact) <= 2 * rounding


def test_a_model_of_fewer_blocks_takes_the_adapters_of_those_blocks_on_request(base):
    config = LoRAConfig(rank=3, alpha=5.0, targets=(*IMAGE_ATTENTION, "text.attention.k"), blocks=(0, 1, 2, 3))
    adapters = random_adapters(add_lora(base, config, nnx.Rngs(0)))
    whole = apply_lora(base, config, adapters)
    short = MMDiT(base.config, depth=2, rngs=nnx.Rngs(0))
    state = nnx.state(short)
    full = dict(nnx.to_flat_state(nnx.state(base)))
    for path, variable in nnx.to_flat_state(state):
        value = full[path].get_value()
        variable.set_value(value[:2] if path[0] == "stacks" else value)
    nnx.update(short, state)
    with pytest.raises(ValueError, match=r"cannot adapt blocks \[2, 3\]: the model holds blocks 0\.\.1"):
        apply_lora(short, config, adapters)
    adapted = apply_lora(short, config, adapters, drop_absent_blocks=True)
    assert list(lora_state(adapted)) == [name for name in adapters if name.split(".")[1] in "01"]
    record = jax.jit(functools.partial(attention_at, block=1))
    inputs = make_inputs(VARIANTS["sd3"])
    found, expected = record(adapted, **inputs), record(whole, **inputs)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5)
    assert np.abs(found.scores - record(short, **inputs).scores).max() > 1e-2
    with pytest.raises(ValueError, match=r"no adapter is for one of the blocks 0\.\.1"):
        apply_lora(short, LoRAConfig(blocks=(3,)), {}, drop_absent_blocks=True)


def test_adapters_of_blocks_that_the_configuration_does_not_name_are_refused_although_absent_ones_are_dropped(base):
    with pytest.raises(ValueError, match=rf"cannot adapt blocks \[{base.depth}\]"):
        apply_lora(base, LoRAConfig(blocks=(0, base.depth)), {}, drop_absent_blocks=True)
    config = LoRAConfig(blocks=(0,))
    adapters = lora_state(add_lora(base, config, nnx.Rngs(0)))
    beyond = {f"blocks.{base.depth}.image.attention.q": adapters["blocks.0.image.attention.q"]}
    with pytest.raises(ValueError, match=rf"surplus: blocks\.{base.depth}\.image"):
        apply_lora(base, config, adapters | beyond, drop_absent_blocks=True)


def test_every_adapter_that_does_not_fit_is_named(base):
    config = LoRAConfig(rank=2)
    adapted = add_lora(base, config, nnx.Rngs(0))
    adapters = random_adapters(adapted)
    adapters["blocks.0.image.attention.w"] = adapters.pop("blocks.0.image.attention.q")
    adapters["blocks.2.image.attention.v"] = Adapter(np.zeros((48, 2)), np.zeros((2, 40)))
    with pytest.raises(ValueError, match="adapters do not match the model") as error:
        set_lora_state(adapted, adapters)
    assert "missing: blocks.0.image.attention.q" in str(error.value)
    assert "surplus: blocks.0.image.attention.w" in str(error.value)
    assert "blocks.2.image.attention.v: expected A and B of ((48, 2), (2, 48)), found ((48, 2), (2, 40))" in str(
        error.value
    )


def test_misuse_is_refused(base):
    adapted = add_lora(base, LoRAConfig(rank=2), nnx.Rngs(0))
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(adapted, LoRAConfig(rank=2), nnx.Rngs(0))
    for function in (merge_lora, remove_lora, lora_state):
        with pytest.raises(ValueError, match="has no adapters"):
            function(base)
    with pytest.raises(ValueError, match=r"no adapted block has a linear layer image\.attention\.w"):
        add_lora(base, LoRAConfig(targets=("image.attention.q", "image.attention.w")), nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"no adapted block has a linear layer text\.attention\.out"):
        add_lora(base, LoRAConfig(targets=TEXT_ATTENTION, blocks=(3,)), nnx.Rngs(0))
    with pytest.raises(ValueError, match="rank is 0"):
        LoRAConfig(rank=0)
    with pytest.raises(ValueError, match="each once"):
        LoRAConfig(targets=("image.attention.q", "image.attention.q"))
    with pytest.raises(ValueError, match="ascending"):
        LoRAConfig(blocks=(3, 1))
