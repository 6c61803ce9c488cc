"""One training step, as a function that can be compiled for arrays, or ahead of time for their shapes.

The loop jits the step for the devices that JAX has. `seg4diff plan` lowers the same step for devices that need not
exist on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seg4diff_jax.data.loader import Batch
from seg4diff_jax.training.optimizers import OptimizerConfig, average_decay, make_optimizer
from seg4diff_jax.training.state import Parameters, Structure, TrainState, initial_state, state_shardings, take_apart

Loss = Callable[[Any, Batch, Any], tuple[Any, dict[str, Any]]]
"""Takes model, batch and random key; returns a scalar, the mean over the batch's items, and its parts (scalars)."""


@dataclass(frozen=True)
class Step:
    """A jitted step, and the shapes and shardings of the state that it updates.

    Attributes:
      shapes, places: shapes of the state's arrays, and their shardings on the mesh.
      initial: takes the trained parameters and returns the state that a run begins with. Jitted.
      take: takes state (donated), frozen parameters and batch; returns the next state and metrics. Jitted.
    """

    shapes: TrainState
    places: TrainState
    initial: Callable[[Parameters], TrainState]
    take: Any


def make_step(
    loss: Loss,
    structure: Structure,
    trainable: Parameters,
    config: OptimizerConfig,
    mesh: Mesh,
    *,
    steps: int,
    seed: int,
) -> Step:
    """Makes the step of a run of `steps` updates. `trainable` may be arrays or only their shapes and dtypes."""
    optimizer = make_optimizer(config, steps)

    def initial(trainable: Parameters) -> TrainState:
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
        return initial_state(trainable, optimizer, average=config.average is not None, key=key)

    shapes = jax.eval_shape(initial, trainable)
    places = state_shardings(shapes, mesh)
    take = jax.jit(
        partial(training_step, loss, structure, optimizer, config),
        donate_argnums=0,
        keep_unused=True,  # so that the arguments of the step are all arrays that it holds in memory
        out_shardings=(places, NamedSharding(mesh, P())),
    )
    return Step(shapes, places, jax.jit(initial, out_shardings=places), take)


def traced_step(
    loss: Loss,
    model: Any,
    trained: Any,
    batch: Batch,
    config: OptimizerConfig,
    mesh: Mesh,
    *,
    steps: int,
    seed: int = 0,
) -> tuple[Any, TrainState, Parameters]:
    """Traces a run's step for shapes alone: `.jaxpr` says what it computes, `.lower().compile()` makes the program.

    Args:
      model, batch: `jax.ShapeDtypeStruct` for every array, with its sharding on the mesh.
      trained: nnx filter of the trained parameters.
      mesh: the mesh, which must also be in context; its devices need not exist on this machine.

    Returns:
      the traced step, and the shapes of its state and of its frozen parameters, with shardings.
    """
    structure, trainable, frozen = take_apart(model, trained)
    step = make_step(loss, structure, trainable, config, mesh, steps=steps, seed=seed)
    there = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    state = jax.tree.map(there, step.shapes, step.places)
    return step.take.trace(state, frozen, batch), state, frozen


def training_step(
    loss: Loss,
    structure: Structure,
    optimizer: optax.GradientTransformationExtraArgs,
    config: OptimizerConfig,
    state: TrainState,
    frozen: Parameters,
    batch: Batch,
) -> tuple[TrainState, dict[str, Any]]:
    """Trains on one batch: gradient, update (or accumulation), average.

    Returns:
      the next state, and metrics: `loss`, its parts and `gradient_norm`.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.batches)

    def objective(trainable: Parameters):
        return loss(structure.model(trainable, frozen), batch, key)

    (value, parts), gradient = jax.value_and_grad(objective, has_aux=True)(state.trainable)
    updates, moments = optimizer.update(gradient, state.optimizer, state.trainable)
    trainable: Any = optax.apply_updates(state.trainable, updates)
    batches = state.batches + 1
    average = state.average
    if average is not None:
        decay = average_decay(config, batches // config.accumulate)
        # While gradients accumulate, parameters do not change, and neither does the average.
        decay = jnp.where(batches % config.accumulate == 0, decay, 1.0)
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, trainable)
    metrics = {"loss": value, **parts, "gradient_norm": optax.global_norm(gradient)}
    return TrainState(batches, trainable, moments, average, state.key), metrics
