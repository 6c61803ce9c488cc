"""One training step, as a function that can be compiled: for arrays that are there, or ahead of time for their shapes.

The loop jits it for the devices that JAX has; `seg4diff plan` lowers the same step for devices that are only described.
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
"""Model, batch and random key to a scalar, the mean over the batch's items, and its parts (scalars)."""


@dataclass(frozen=True)
class Step:
    """A jitted step, and the state that it moves on.

    Attributes:
      shapes, places: of the state, and where it lies on the mesh.
      initial: trained parameters to the state that a run begins with. Jitted.
      take: state (whose memory it gives away), frozen parameters and batch to the next state and metrics. Jitted.
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
    """The step of a run of `steps` updates. Of `trainable`, arrays or their shapes, only shapes and dtypes count."""
    optimizer = make_optimizer(config, steps)

    def initial(trainable: Parameters) -> TrainState:
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
        return initial_state(trainable, optimizer, average=config.average is not None, key=key)

    shapes = jax.eval_shape(initial, trainable)
    places = state_shardings(shapes, mesh)
    take = jax.jit(
        partial(training_step, loss, structure, optimizer, config),
        donate_argnums=0,
        keep_unused=True,  # so that what lies in memory in a step is among its arguments
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
    """A run's step traced for shapes alone: `.jaxpr` says what it computes, `.lower().compile()` makes the program.

    Args:
      model, batch: `jax.ShapeDtypeStruct` for every array, with its sharding on the mesh.
      trained: nnx filter of what is trained.
      mesh: in context too; its devices may be described ones.

    Returns the traced step, and the shapes of the state and of the frozen parameters that it takes, with shardings.
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
    """One batch: gradient, update (or accumulation), average. Metrics: `loss`, its parts and `gradient_norm`."""
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
        # Between updates nothing has moved, and the average stays.
        decay = jnp.where(batches % config.accumulate == 0, decay, 1.0)
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, trainable)
    metrics = {"loss": value, **parts, "gradient_norm": optax.global_norm(gradient)}
    return TrainState(batches, trainable, moments, average, state.key), metrics
