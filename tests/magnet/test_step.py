"""One MAGNET step equals PyTorch's: diffusers' transformer, PEFT's adapters, autograd, AdamW.

There attention is an explicit softmax whose scores autograd goes through, every mask is computed by itself, and SciPy
matches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from diffusers import SD3Transformer2DModel
from flax import nnx

from seg4diff_jax.magnet.objective import MagnetBatch, MagnetObjective, magnet_loss
from seg4diff_jax.models.attention import ForwardOptions
from seg4diff_jax.models.lora import IMAGE_ATTENTION, LoRA, LoRAConfig, add_lora, apply_lora, lora_state
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.training.optimizers import OptimizerConfig, make_optimizer
from seg4diff_jax.training.state import take_apart
from tests.reference import magnet as reference
from tests.reference.attention import explicit_softmax
from tests.reference.magnet import Image, ReleaseHead, carried, release_head
from tests.reference.magnet_batch import BLOCK, CLIP, GRID, REAL, SPANS, TRAINABLE, Trained, make_batch
from tests.reference.mmdit import SMALL, make_pair, run_torch
from tests.reference.peft_adapters import add_peft_adapters, factors
from tests.reference.random_weights import relative_error

PLACES_OF_IDS = [[[1, 2, 3], [], [1, 3]], [[1, 2], [1, 2, 3, 5], [3, 4, 5]]]
RATE, DECAY, CLIP_NORM = 1e-3, 1e-2, 0.01
LITTLE = 0.02
"""Weight of the velocity where it is not the published one: otherwise the masks' part of a gradient is too small to
show its errors."""
OBJECTIVES = {
    "paper, classes": MagnetObjective(velocity_weight=LITTLE),
    "release, classes": MagnetObjective(focal="release", mask_head="conv"),
    "paper, matching": MagnetObjective(targets="matching", velocity_weight=LITTLE),
    "release, matching": MagnetObjective(targets="matching", focal="release", mask_head="conv", velocity_weight=LITTLE),
    "log_probs": MagnetObjective(masks_from="log_probs", velocity_weight=LITTLE),
}


def adapted_layers(base: MMDiT, config: LoRAConfig) -> list[str]:
    """Names of the layers that get adapters, without numbers drawn for them."""
    names: list[str] = []
    jax.eval_shape(lambda: names.extend(lora_state(add_lora(base, config, nnx.Rngs(0)))))
    return names


def torch_losses(
    theirs: SD3Transformer2DModel, processors: list, batch: MagnetBatch, objective: MagnetObjective, head: Any
) -> dict[str, torch.Tensor]:
    """MAGNET's loss and its parts, with autograd's graph."""
    latents, noise = (torch.tensor(np.asarray(array)) for array in (batch.images.latents, batch.images.noise))
    sigma = np.asarray(batch.images.sigma)
    level = torch.tensor(sigma)[:, None, None, None]
    noisy = ((1 - level) * latents + level * noise).numpy()
    inputs = {"latents": noisy, "timesteps": 1000 * sigma, "conditioning": batch.texts}
    velocity = run_torch(theirs, inputs)
    tokens = GRID[0] * GRID[1]
    read = processors[BLOCK].scores if objective.masks_from == "scores" else processors[BLOCK].probs
    maps = read[:, :, :tokens, tokens : tokens + CLIP]
    table = PLACES_OF_IDS if objective.focal == "release" else SPANS
    images = []
    for image, real in enumerate(REAL):
        places = [table[image][row] for row in np.flatnonzero(real)] if objective.targets == "classes" else []
        images.append(Image(maps[image], torch.tensor(np.asarray(batch.masks[image])[real]), places))
    if objective.masks_from == "log_probs":
        parts = reference.class_losses(images, GRID)
    else:
        parts = reference.losses(images, GRID, release=objective.focal == "release", head=head)
    parts["velocity"] = (velocity - (noise - latents)).square().mean()
    weight = objective.velocity_weight
    return parts | {"loss": weight * parts["velocity"] + 0.1 * parts["focal"] + 0.2 * parts["dice"]}


def torch_step(theirs: SD3Transformer2DModel, head: ReleaseHead | None) -> None:
    """AdamW after clipping; biases do not decay."""
    trained = [parameter for name, parameter in theirs.named_parameters() if ".lora_" in name]
    biases = []
    for name, parameter in () if head is None else head.named_parameters():
        (biases if name.endswith("bias") else trained).append(parameter)
    groups = [{"params": trained, "weight_decay": DECAY}, {"params": biases, "weight_decay": 0.0}]
    torch.nn.utils.clip_grad_norm_(trained + biases, CLIP_NORM)
    torch.optim.AdamW(groups, lr=RATE).step()


@dataclass
class Step:
    """Ours and theirs of one step: values of the losses, gradients and the parameters before and after, by name."""

    losses: tuple[dict, dict]
    gradients: tuple[dict, dict]
    before: dict
    after: tuple[dict, dict]


def named(theirs: SD3Transformer2DModel, head: ReleaseHead | None, layers: list[str], take) -> dict[str, np.ndarray]:
    """What `take` finds in every trained parameter, in our layout."""
    found = {
        f"{layer}.{x}": a
        for layer, pair in factors(theirs, layers, take).items()
        for x, a in zip("ab", pair, strict=True)
    }
    for name, parameter in () if head is None else head.named_parameters():
        array = take(parameter).detach().numpy()
        found[name] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return {name: np.array(array) for name, array in found.items()}


def ours_named(model: Trained) -> dict[str, np.ndarray]:
    found = {
        f"{layer}.{x}": a
        for layer, pair in lora_state(model.transformer).items()
        for x, a in zip("ab", pair, strict=True)
    }
    for number, layer in zip((0, 2, 4), model.head.layers if model.head else (), strict=bool(model.head)):
        found[f"attn_mlp.attn_score_layer.{number}.weight"] = layer.kernel.get_value()
        found[f"attn_mlp.attn_score_layer.{number}.bias"] = layer.bias.get_value()
    return {name: np.asarray(array) for name, array in found.items()}


@pytest.fixture(scope="module", params=OBJECTIVES)
def step(request) -> Step:
    objective = OBJECTIVES[request.param]
    batch = make_batch(objective)
    theirs, base = make_pair(SMALL)
    config = LoRAConfig(rank=4, alpha=6.0)
    layers = adapted_layers(base, config)
    add_peft_adapters(theirs, config, layers)
    head = release_head(seed=4) if objective.mask_head else None
    model = Trained(apply_lora(base, config, factors(theirs, layers, lambda w: w)), carried(head) if head else None)
    take = functools.partial(named, theirs, head, layers)

    before = take(lambda parameter: parameter)
    expected = torch_losses(theirs, explicit_softmax(theirs), batch, objective, head)
    expected["loss"].backward()
    expected_gradients = take(lambda parameter: parameter.grad)
    torch_step(theirs, head)

    structure, trainable, frozen = take_apart(model, TRAINABLE)

    @jax.jit
    def gradient(trainable, frozen):
        def loss(trainable):
            model = structure.model(trainable, frozen)
            options: Any = {"block": BLOCK, "head": model.head}
            return magnet_loss(model.transformer, batch, objective, options=ForwardOptions(remat=True), **options)

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    (value, parts), gradients = gradient(trainable, frozen)
    options: Any = {"learning_rate": RATE, "schedule": "constant", "weight_decay": DECAY, "clip": CLIP_NORM}
    optimizer = make_optimizer(OptimizerConfig(**options), 10)

    @jax.jit
    def updated(trainable, gradients):
        updates, _ = optimizer.update(gradients, optimizer.init(trainable), trainable)
        return optax.apply_updates(trainable, updates)

    after = updated(trainable, gradients)
    by_name = lambda arrays: ours_named(structure.model(arrays, frozen))
    return Step(
        ({"loss": value, **parts}, expected),
        (by_name(gradients), expected_gradients),
        before,
        (by_name(after), take(lambda parameter: parameter)),
    )


def test_the_loss_and_its_parts_are_torchs(step):
    ours, theirs = step.losses
    assert ours.keys() == theirs.keys() == {"loss", "velocity", "focal", "dice"}
    for name, value in theirs.items():
        assert float(ours[name]) == pytest.approx(value.item(), rel=1e-5), name


def test_the_gradient_of_every_adapter_is_torchs(step):
    ours, theirs = step.gradients
    assert ours.keys() == theirs.keys()
    assert len([name for name in ours if name.startswith("blocks")]) == 2 * len(IMAGE_ATTENTION) * SMALL["num_layers"]
    for name, expected in theirs.items():
        assert np.any(expected), name
        assert relative_error(ours[name], expected) <= 1e-4, name


def test_parameters_after_adamw_are_torchs(step):
    ours, theirs = step.after
    assert ours.keys() == theirs.keys() == step.before.keys()
    for name, expected in theirs.items():
        assert relative_error(ours[name], expected) <= 1e-4, name
        moved = np.abs(expected - step.before[name])
        assert moved.max() > RATE / 10, name
        assert np.abs(ours[name] - expected).max() <= RATE / 100, name


# ---- which way gradients go -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted() -> MMDiT:
    theirs, base = make_pair(SMALL)
    config = LoRAConfig(rank=2)
    layers = adapted_layers(base, config)
    add_peft_adapters(theirs, config, layers)
    return apply_lora(base, config, factors(theirs, layers, lambda weight: weight))


# Scores hold the image's queries against the text's keys; what normalises probabilities holds them against the image's.
@pytest.mark.parametrize(
    ("objective", "of_the_block"),
    [
        (MagnetObjective(velocity_weight=0.0), "q"),
        (MagnetObjective("matching", velocity_weight=0.0), "q"),
        (MagnetObjective(masks_from="log_probs", velocity_weight=0.0), "qk"),
    ],
)
def test_masks_teach_the_maps_of_the_block_asked_for_and_what_comes_before_it(adapted, objective, of_the_block):
    structure, trainable, frozen = take_apart(adapted, LoRA)
    batch = make_batch(objective)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(trainable, block):
        loss = lambda trainable: magnet_loss(structure.model(trainable, frozen), batch, objective, block=block)[0]
        return jax.grad(loss)(trainable)

    for block in (1, 2):
        found = lora_state(structure.model(gradient(trainable, block), frozen))
        learns = {name for name, pair in found.items() if np.any(pair.a) and np.any(pair.b)}
        expected = {name for name in found if int(name.split(".")[1]) < block}
        expected |= {f"blocks.{block}.image.attention.{name}" for name in of_the_block}
        assert learns == expected
        assert all(not np.any(factor) for name in found.keys() - learns for factor in found[name])


def test_objectives_that_contradict_themselves_are_refused(adapted):
    with pytest.raises(ValueError, match="masks have no classes"):
        MagnetObjective("matching", masks_from="log_probs")
    with pytest.raises(ValueError, match="focal is 'release' and masks_from 'log_probs'"):
        MagnetObjective(masks_from="log_probs", focal="release")
    with pytest.raises(ValueError, match="mask_head is 'conv' and masks_from 'log_probs'"):
        MagnetObjective(masks_from="log_probs", mask_head="conv")
    with pytest.raises(ValueError, match=r"alpha is 0\.5 and masks_from 'log_probs'"):
        MagnetObjective(masks_from="log_probs", alpha=0.5)
    with pytest.raises(ValueError, match=r"focal_cost is 5\.0 and targets 'classes', which match nothing"):
        MagnetObjective(focal_cost=5.0)
    with pytest.raises(ValueError, match=r"gamma 1\.0; the release's is 2"):
        MagnetObjective(focal="release", gamma=1.0)
    with pytest.raises(ValueError, match=r"gamma is 0\.5; with log_probs"):
        MagnetObjective(masks_from="log_probs", gamma=0.5)
    with pytest.raises(ValueError, match="gamma is -1"):
        MagnetObjective(gamma=-1.0)
    run = functools.partial(magnet_loss, adapted, block=1)
    batch, objective = make_batch(MagnetObjective()), MagnetObjective()
    with pytest.raises(ValueError, match="targets is 'matching' and the batch has averaging"):
        run(batch, MagnetObjective("matching"))
    with pytest.raises(ValueError, match="targets is 'classes' and the batch has no averaging"):
        run(batch._replace(averaging=None), objective)
    with pytest.raises(ValueError, match="mask_head is 'conv' and no head was given"):
        run(batch, MagnetObjective(mask_head="conv"))
    with pytest.raises(ValueError, match="mask_head is None and a head was given"):
        run(batch, objective, head=carried(release_head()))
