"""The optimizer of every task: AdamW, on request Muon for matrices, with clipping, schedule, decay and accumulation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Float, Int

from seg4diff_jax.checked import Checked

TINY, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""Limits of the 32-bit numbers that a step computes with: smaller numbers are 0 there, larger ones infinite."""
BOUNDS: dict[str, tuple[str, Callable[[int | float], bool]]] = {
    "learning_rate": ("a finite number, more than 0", lambda value: TINY <= value <= LARGEST),
    "warmup": ("at least 0 updates", lambda value: value >= 0),
    "weight_decay": ("a finite number, at least 0", lambda value: 0 <= value <= LARGEST),
    "betas": ("0 <= beta < 1", lambda value: 0 <= value < 1),
    "epsilon": ("a finite number, more than 0", lambda value: TINY <= value <= LARGEST),
    "clip": ("a finite number, more than 0, or null for no clipping", lambda value: TINY <= value <= LARGEST),
    "accumulate": ("at least 1 batch for an update", lambda value: value >= 1),
    "average": ("0 <= average < 1, or null for none", lambda value: 0 <= value < 1),
    "rates": ("a finite factor, at least 0", lambda value: 0 <= value <= LARGEST),
}
"""Each option's expected values, in words and as a test. NaN passes no test."""
ScheduleName = Literal["constant", "cosine", "last_quarter", "detectron2"]


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """Settings of the optimizer.

    Attributes:
      learning_rate: the largest learning rate.
      schedule: the learning rate after the warm-up: constant; cosine to zero; constant, then linear to zero over the
        last quarter; or detectron2's warm-up cosine, whose cosine counts from the first update and whose warm-up ends
        on that cosine.
      warmup: number of updates over which the rate rises linearly.
      weight_decay: decoupled weight decay of matrices and convolutions, not of biases, norms, embeddings and tables.
      betas: Adam's decay rates of the first and the second moment.
      epsilon: Adam's term that keeps the denominator above zero.
      muon: regular expression of the names of matrices that Muon updates instead of Adam. The update is the orthogonal
        matrix nearest to the momentum, with a root mean square of `MUON_SIZE` times the rate. Each matrix of a stack
        is updated by itself.
      clip: largest global norm of a gradient; None: gradients are not clipped.
      accumulate: number of batches whose gradients are averaged into one update.
      average: decay of the moving average of the parameters, which is evaluated and exported; None: no average. After
        n updates the decay is at most (1 + n) / (10 + n).
      rates: factors of the learning rate, by regular expression of parameter names; the first match counts.
    """

    learning_rate: float = 1e-4
    schedule: ScheduleName = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    muon: str | None = None
    clip: float | None = 1.0
    accumulate: int = 1
    average: float | None = None
    rates: dict[str, float] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        found = [
            f"optimizer.{place} is {value}; expected {bounds}"
            for name, (bounds, fits) in BOUNDS.items()
            for place, value in _values(name, getattr(self, name))
            if not fits(value)
        ]
        for pattern in (*self.rates, *([] if self.muon is None else [self.muon])):
            try:
                re.compile(pattern)
            except re.error as error:
                found.append(f"optimizer: {pattern!r} is no regular expression ({error})")
        return found


def _values(name: str, value: Any) -> list[tuple[str, int | float]]:
    """Returns the numbers of an option, each with its name."""
    if isinstance(value, Mapping):
        return [(f"{name}[{key!r}]", factor) for key, factor in value.items()]
    if isinstance(value, Sequence):
        return [(f"{name}[{place}]", each) for place, each in enumerate(value)]
    return [] if value is None else [(name, value)]


def _warmed(rate: float, warmup: int, after: optax.Schedule) -> optax.Schedule:
    """Puts a linear warm-up before a schedule. It starts at rate / (warmup + 1): a rate of 0 would waste an update."""
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(rate / (warmup + 1), rate, warmup), after], [warmup])


def _constant(rate: float, warmup: int, steps: int) -> optax.Schedule:
    return _warmed(rate, warmup, optax.constant_schedule(rate))


def _cosine(rate: float, warmup: int, steps: int) -> optax.Schedule:
    return _warmed(rate, warmup, optax.cosine_decay_schedule(rate, max(1, steps - warmup)))


def _last_quarter(rate: float, warmup: int, steps: int) -> optax.Schedule:
    fall = max(1, steps // 4)
    return _warmed(rate, warmup, optax.linear_schedule(rate, 0.0, fall, max(0, steps - warmup - fall)))


def _detectron2(rate: float, warmup: int, steps: int) -> optax.Schedule:
    cosine = optax.cosine_decay_schedule(rate, steps)
    if not warmup:
        return cosine
    meeting = 0.5 * rate * (1 + math.cos(math.pi * warmup / steps))
    rise = optax.linear_schedule(0.01 * rate, meeting, warmup)
    return optax.join_schedules([rise, lambda count: cosine(count + warmup)], [warmup])


SCHEDULES: dict[ScheduleName, Callable[[float, int, int], optax.Schedule]] = {
    "constant": _constant,
    "cosine": _cosine,
    "last_quarter": _last_quarter,
    "detectron2": _detectron2,
}


def schedule_problems(config: OptimizerConfig, steps: int) -> list[str]:
    if config.warmup < steps:
        return []
    return [f"optimizer.warmup is {config.warmup}; expected less than the run's {steps} steps"]


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """Returns a function from the number of updates made so far to the learning rate of the next update.

    Raises:
      ValueError: the warm-up takes all steps.
    """
    for each in schedule_problems(config, steps):
        raise ValueError(each)
    return SCHEDULES[config.schedule](config.learning_rate, config.warmup, steps)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer for a flat dictionary of parameters by name, and a run of `steps` updates."""
    chain = optax.chain(
        optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip),
        _scale_by_moments(config),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
        _scale_by_group(config.rates),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
    if config.accumulate == 1:
        return optax.with_extra_args_support(chain)
    multi = optax.MultiSteps(chain, config.accumulate)
    return optax.GradientTransformationExtraArgs(multi.init, multi.update)  # pyright: ignore[reportArgumentType]


MUON_SIZE = 0.2
"""Root mean square of Muon's updates at a rate of 1: about that of Adam's, so that one learning rate fits both."""


def _scale_by_moments(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(*config.betas, eps=config.epsilon)
    pattern = config.muon
    if pattern is None:
        return adam

    def kind(parameters: dict[str, Any]) -> dict[str, str]:
        kinds = {name: "muon" if re.search(pattern, name) else "adam" for name in parameters}
        chosen = [name for name in parameters if kinds[name] == "muon"]
        if not chosen or any(parameters[name].ndim < 2 for name in chosen):
            raise ValueError(f"optimizer.muon is {pattern!r}; expected to match matrices and nothing else")
        return kinds

    def matrices(parameters: Any) -> Any:
        is_array = lambda value: hasattr(value, "ndim")
        place = lambda value: optax.contrib.MuonDimensionNumbers(value.ndim - 2, value.ndim - 1)
        return jax.tree.map(lambda value: place(value) if is_array(value) else None, parameters)

    def resize(updates, params=None):
        return jax.tree.map(lambda update: MUON_SIZE * math.sqrt(max(update.shape[-2:])) * update, updates)

    muon = optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=matrices), optax.stateless(resize))
    return optax.partition({"adam": adam, "muon": muon}, kind)


def _decayed(parameters: dict[str, Any]) -> dict[str, bool]:
    return {name: name.endswith(("kernel", "lora_a", "lora_b")) for name in parameters}


def _scale_by_group(rates: dict[str, float]) -> optax.GradientTransformation:
    def factor(name: str) -> float:
        return next((rate for pattern, rate in rates.items() if re.search(pattern, name)), 1.0)

    def update(updates, state, params=None):
        return {name: factor(name) * update for name, update in updates.items()}, state

    def init(params):
        unused = [pattern for pattern in rates if not any(re.search(pattern, name) for name in params)]
        if unused:
            raise ValueError(f"optimizer.rates: no trained parameter's name holds {', '.join(map(repr, unused))}")
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)


def average_decay(config: OptimizerConfig, updates: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the decay of the moving average at update number `updates`, counted from 1."""
    assert config.average is not None
    return jnp.minimum(config.average, (1.0 + updates) / (10.0 + updates))
