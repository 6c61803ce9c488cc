"""A problem that trains in milliseconds, with a random part in its loss, to try the loop on.

python -m tests.reference.small_training {dies | evaluates | exports} OUT
python -m tests.reference.small_training told OUT [SIGINT]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seg4diff_jax.processes import join_processes
from seg4diff_jax.training.loop import RunConfig, Task, train
from seg4diff_jax.training.optimizers import OptimizerConfig
from seg4diff_jax.training.state import fresh
from seg4diff_jax.training.termination import termination

OPTIMIZER = OptimizerConfig(learning_rate=0.02, schedule="cosine", warmup=2, weight_decay=0.01, average=0.9)


class Points:
    """Points and their targets; items in `broken` are not numbers."""

    def __init__(self, count: int = 64, broken: tuple[int, ...] = ()):
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> dict:
        x = np.random.default_rng(index).normal(size=4).astype(np.float32)
        return {"x": x * (np.nan if index in self.broken else 1), "y": np.sin(x).sum(keepdims=True)}


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 8):
        self.up = nnx.Linear(4, width, rngs=rngs)
        self.down = nnx.Linear(width, 1, rngs=rngs)
        self.scale = nnx.Variable(jnp.ones(()))

    def __call__(self, x):
        return self.scale[...] * self.down(jnp.tanh(self.up(x)))


def noisy_loss(net: Net, batch, key):
    x = batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)
    error = jnp.square(net(x) - batch["y"]).mean()
    return error, {"error": error}


def loss(net: Net, batch, key):
    return jnp.square(net(batch["x"]) - batch["y"]).mean(), {}


def make_task(**changes) -> Task:
    task = Task(name="points", init=fresh(Net), loss=noisy_loss, source=Points(), item="point {}".format)
    return replace(task, **changes)


def make_run(out: Path | str, **changes) -> RunConfig:
    run = RunConfig(str(out), steps=20, batch_size=4, log_every=1, evaluate_every=5, checkpoint_every=5, keep=2)
    return replace(run, **changes)


def die(_: nnx.Module) -> dict[str, float]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def endless(_: nnx.Module) -> dict[str, float]:
    print("evaluating", flush=True)
    while True:
        time.sleep(0.01)


def export_endlessly(*_: object) -> None:
    print("exporting", flush=True)
    while True:
        time.sleep(0.01)


def tell_the_second(_: nnx.Module, told: list[signal.Signals]) -> dict[str, float]:
    if jax.process_index() == 1 and told:
        os.kill(os.getpid(), told.pop())
    return {}


if __name__ == "__main__":
    out = sys.argv[2]
    match sys.argv[1]:
        case "dies":  # without a word at step 15, with checkpoints of steps 5 and 10
            train(make_task(evaluate=die), make_run(out, evaluate_every=15), OPTIMIZER)
        case "evaluates":  # for ever, after step 7
            train(make_task(evaluate=endless), make_run(out, evaluate_every=7), OPTIMIZER)
        case "exports":  # for ever, after the last step; Ctrl-C is what it is to `train.py`
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            with termination():
                train(make_task(export=export_endlessly), make_run(out), OPTIMIZER)
        case "told":  # one of two processes, after step 7
            join_processes()
            run = make_run(out, steps=5000, evaluate_every=7, checkpoint_every=5000, log_every=5000)
            tell = partial(tell_the_second, told=[signal.Signals[sys.argv[3]] if sys.argv[3:] else signal.SIGTERM])
            try:
                train(make_task(evaluate=tell), run, OPTIMIZER)
            except KeyboardInterrupt as stopped:
                print(stopped, file=sys.stderr)
                sys.exit(130)
