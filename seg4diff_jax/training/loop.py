"""The training loop, for every task and any mesh. A resumed run gives the same bits as one that was never stopped.

    RUN/config.yaml          the resolved configuration
    RUN/metrics.jsonl        one row per log and per evaluation; the same numbers in TensorBoard's event file
    RUN/pictures.png         one row per evaluation, of tasks that make pictures; RUN/pictures/ has them apart
    RUN/checkpoints/<step>/  see `seg4diff_jax.training.checkpoints`
    RUN/export/              what the task exports of the trained model

A run ends at the last step; at SIGTERM or Ctrl-C, after writing a checkpoint (see `training.termination`); or at a loss
or gradient that is not finite or a full disk (the last good checkpoint stays).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import UInt8

from seg4diff_jax.checked import Checked
from seg4diff_jax.compilation import CompilationClock
from seg4diff_jax.convert.run_checkpoint import finite
from seg4diff_jax.data.loader import Augment, Batch, DataSource, training_batches
from seg4diff_jax.numerics import settled
from seg4diff_jax.parallel import BATCH, MeshConfig, batch_share, make_mesh, named_devices
from seg4diff_jax.training.checkpoints import Checkpoints
from seg4diff_jax.training.errors import TrainingError
from seg4diff_jax.training.logs import METRICS, Logs, Throughput
from seg4diff_jax.training.loss_watch import Watch
from seg4diff_jax.training.optimizers import OptimizerConfig, make_schedule
from seg4diff_jax.training.resumption import check_accumulation, found_nothing, remarks, to_go_on
from seg4diff_jax.training.stages import say, stage
from seg4diff_jax.training.state import Parameters, Structure, TrainState, take_apart
from seg4diff_jax.training.step import Loss, make_step
from seg4diff_jax.training.termination import Interrupted, Terminated, Termination, termination
from seg4diff_jax.training.throughput import Work, measured_peak

CONFIG, EXPORT = "config.yaml", "export"


@dataclass(frozen=True)
class Task:
    """What to train, and on which data. Functions are pure; the model is an nnx module.

    Attributes:
      name: the task's name in the logs.
      init: makes the model from a seed and a mesh, its parameters on the mesh (`state.fresh` makes such a function).
      loss: takes model, batch and random key; returns a scalar, the mean over the batch's items, and its scalar parts.
      source: the training items.
      augment: changes the items anew in every epoch, see `data.loader.training_batches`.
      trainable: nnx filter of the trained parameters; the others are stored once, without gradient or optimizer state.
      evaluate: takes the model, with averaged parameters if there are any, and returns metrics. Every process calls it.
        Its arrays may be spread over several processes, so they are read through `parallel.on_host`.
      pictures: takes the same model as `evaluate` and returns a picture of fixed size that shows the progress. The
        pictures of all evaluations are stacked.
      best: the metric whose largest value marks the best checkpoint.
      export: takes the same model as `evaluate` and a directory, and writes the run's result there.
      item: returns the name of an item, from its number, for error messages.
      work: the work of a step per item, from which the log computes the fraction of the devices' peak; None: not known.
      then: takes the directory of an export and returns what can be done with it, and the command for each.
    """

    name: str
    init: Callable[[int, Mesh], Any]
    loss: Loss
    source: DataSource
    augment: Augment | None = None
    trainable: Any = nnx.Param
    evaluate: Callable[[Any], dict[str, float]] | None = None
    pictures: Callable[[Any], UInt8[np.ndarray, "height width 3"]] | None = None
    best: str | None = None
    export: Callable[[Any, Path], None] | None = None
    item: Callable[[int], str] = "item {}".format
    work: Work | None = None
    then: Callable[[Path], dict[str, str]] | None = None


@dataclass(frozen=True)
class RunConfig(Checked):
    """Settings of a run: its directory, length and batch, and how often it logs, evaluates and checkpoints.

    Attributes:
      out: directory of the run.
      steps: number of updates of the parameters.
      batch_size: items per batch, over all devices and processes.
      seed: seed of parameters, data order and noise.
      log_every: number of steps between two logs.
      evaluate_every: number of steps between two evaluations.
      checkpoint_every: number of steps between two checkpoints.
      keep: number of latest checkpoints to keep, beside the best.
      workers: number of processes that prepare data; 0: threads of this process.
      mesh: devices along each axis of the mesh.
    """

    out: str
    steps: int
    batch_size: int
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 2
    workers: int = 0
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        counts = ("steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every", "keep")
        found = {name: getattr(self, name) for name in counts if getattr(self, name) < 1}
        said = [f"run.{name} is {value}; expected at least 1" for name, value in found.items()]
        if self.workers < 0:
            said.append(f"run.workers is {self.workers}; expected 0 (threads of this process) or more")
        return said


@settled()
def train(
    task: Task, run: RunConfig, optimizer: OptimizerConfig, record: Mapping[str, Any] | None = None, *, resume=False
) -> Any:
    """Trains a model and returns it, with averaged parameters if there are any.

    Args:
      record: the resolved configuration as plain values, saved beside the results and in every checkpoint.
      resume: continue from the run's last checkpoint, if it has one.

    Raises:
      TrainingError: the run cannot begin or continue.
      ValueError: see `check`.
      Terminated: SIGTERM came before the first step.
      Interrupted: Ctrl-C came (also a KeyboardInterrupt). The message says which step is checkpointed.
    """
    out = Path(run.out)
    nothing = found_nothing(out) if resume else ""
    mesh = check(run, optimizer)
    if task.work is not None:
        measured_peak(task.work.dtype)  # cached now, while no mesh is in context and devices are idle
    with jax.set_mesh(mesh), Checkpoints(out, keep=run.keep, best=task.best) as checkpoints, termination() as stop:
        if checkpoints.latest is not None and not resume:
            raise TrainingError(
                f"{out} holds a run, checkpointed at step {checkpoints.latest}: give --resume to go on with it, or "
                "another --run.out"
            )
        if resume and checkpoints.latest is None:
            say(f"{task.name}: there is no checkpoint to go on from, and the run begins anew: {nothing}")
        with stop.dispensable():
            trainer = _prepare(task, run, optimizer, mesh)
        start, taken, said = checkpoints.latest or 0, 0, []
        if checkpoints.latest is not None:
            with stage(f"restoring step {start} of {out}"):
                trainer.state, taken, before, checked = checkpoints.restore(start, trainer.state, trainer.places)
            check_accumulation(before, optimizer.accumulate)
            said = remarks(start, before, record or {}, checked=checked)
            if start >= run.steps:
                said.append(f"all {run.steps} steps are taken: for more of them give a larger --run.steps")
        with stop.dispensable():
            data = _data(task, run, mesh, taken)
            data = chain([next(data)], data) if start < run.steps else data  # the first batch starts the workers
        if jax.process_index() == 0:  # only now is it known that the configuration fits the checkpoint
            out.mkdir(parents=True, exist_ok=True)
            (out / CONFIG).write_text(yaml.safe_dump(dict(record or {}), sort_keys=False), encoding="utf-8")
        with Logs(out, name=task.name, steps=run.steps, start=start, writes=jax.process_index() == 0) as logs:
            for remark in said:
                logs.say(remark)
            if start:
                _make_up(trainer, run, start, checkpoints, logs, stop)
            stopped = _steps(trainer, run, data, start, checkpoints, logs, stop, record or {})
        finished = trainer.done(run)
        model = trainer.gathered_model() if finished else trainer.averaged_model()
    if finished and jax.process_index() == 0:
        _finish(task, model, out)
    if stopped is not None and stop.interrupted:
        raise Interrupted(stopped)
    return model


def _finish(task: Task, model: Any, out: Path) -> None:
    """Writes the export, and says where the results are and what can be done with them."""
    if task.export is not None:
        task.export(model, out / EXPORT)
    kept = f"checkpoints in {out / 'checkpoints'}, logs in {out / METRICS}"
    say(f"{task.name}: finished; {kept}" if task.export is None else f"{task.name}: wrote {out / EXPORT}; {kept}")
    for what, command in (task.then(out / EXPORT) if task.then else {}).items():
        say(f"to {what}:  {command}")


def check(run: RunConfig, optimizer: OptimizerConfig) -> Mesh:
    """Returns the mesh of a run. Raises ValueError when batch, mesh and optimizer settings do not fit together."""
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    check_batch(run, mesh)
    make_schedule(optimizer, run.steps)
    return mesh


def check_batch(run: RunConfig, mesh: Mesh) -> None:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if run.batch_size % parts:
        raise ValueError(
            f"run.batch_size is {run.batch_size}; expected a multiple of the {parts} devices that share a batch "
            "(run.mesh.data x run.mesh.fsdp)"
        )


def _data(task: Task, run: RunConfig, mesh: Mesh, taken: int) -> Iterator[Batch]:
    processes = np.array([device.process_index for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    return training_batches(
        task.source,
        batch_size=run.batch_size,
        seed=run.seed,
        augment=task.augment,
        workers=run.workers,
        process=batch_share(processes, jax.process_index()),
        start=taken,
    )


# ---- one step -------------------------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """The model in training: its state, and the compiled step that updates the state."""

    task: Task
    optimizer: OptimizerConfig
    structure: Structure
    state: TrainState
    frozen: Parameters
    places: TrainState
    mesh: Mesh
    step: Callable[[TrainState, Parameters, Batch], tuple[TrainState, dict[str, Any]]]
    schedule: Callable[[int], Any]

    def averaged_model(self) -> Any:
        chosen = self.state.trainable if self.state.average is None else self.state.average
        return self.structure.model(chosen, self.frozen)

    def gathered_model(self) -> Any:
        """Returns the averaged model. With several processes, each gets a copy of all parameters in its own memory."""
        if jax.process_count() == 1:
            return self.averaged_model()
        state = multihost_utils.process_allgather(self.state._replace(optimizer=None), tiled=True)
        chosen = state.trainable if state.average is None else state.average
        return self.structure.model(chosen, multihost_utils.process_allgather(self.frozen, tiled=True))

    def done(self, run: RunConfig) -> bool:
        return int(self.state.batches) >= run.steps * self.optimizer.accumulate

    def put(self, batch: Batch) -> Batch:
        """Joins the hosts' shares of a batch to arrays over all devices."""
        place = NamedSharding(self.mesh, BATCH)
        return {name: jax.make_array_from_process_local_data(place, np.asarray(x)) for name, x in batch.items()}


def _prepare(task: Task, run: RunConfig, config: OptimizerConfig, mesh: Mesh) -> Trainer:
    structure, trainable, frozen = take_apart(task.init(run.seed, mesh), task.trainable)
    step = make_step(task.loss, structure, trainable, config, mesh, steps=run.steps, seed=run.seed)
    state, schedule = step.initial(trainable), make_schedule(config, run.steps)
    return Trainer(task, config, structure, state, frozen, step.places, mesh, step.take, schedule)


# ---- all steps ------------------------------------------------------------------------------------------------------


def _steps(
    trainer: Trainer,
    run: RunConfig,
    data: Iterator[Batch],
    start: int,
    checkpoints: Checkpoints,
    logs: Logs,
    stop: Termination,
    record: Mapping[str, Any],
) -> str | None:
    """Takes all remaining steps. Returns None, or a message if a signal stopped the run."""
    watch, throughput = Watch(trainer.task.item), Throughput()
    for done in range(start + 1, run.steps + 1):
        last = done == run.steps
        if done == start + 1:
            values = _take_first(trainer, data, done, watch, logs)
            if not last and done % run.log_every:
                logs.show(done, values)
            throughput.restart()  # the rate excludes compilation
        else:
            _take(trainer, data, done, watch)
            throughput.count(run.batch_size * trainer.optimizer.accumulate)
        stopping = stop.come(done)
        logs.advance(done)
        if last or stopping or done % run.log_every == 0:
            values = watch.take()
            logs.row(done, values | _rates(trainer, done, throughput.take()))
        throughput.pause()
        scores, failure = None, None
        if not stopping and (last or done % run.evaluate_every == 0):
            watch.check()
            scores, failure = _evaluate(trainer, done, logs, stop)
            stopping = isinstance(failure, Terminated)
        if last or stopping or failure or done % run.checkpoint_every == 0:
            watch.check()
            checkpoints.save(done, trainer.state, done * trainer.optimizer.accumulate, record, scores)
        if isinstance(failure, Exception):
            raise failure
        throughput.resume()
        if stopping:
            checkpoints.wait()
            where = f"checkpointed in {Path(run.out) / 'checkpoints' / str(done)}"
            said = f"stopped by {stop.by} after step {done}, which is {where}: {to_go_on(Path(run.out), record)}"
            if not stop.interrupted:
                logs.say(said)
            return said
    return None


def _take(trainer: Trainer, data: Iterator[Batch], done: int, watch: Watch) -> dict[str, Any]:
    """Takes one step. Returns the metrics of its last batch, which the device may still be computing."""
    metrics: dict[str, Any] = {}
    for _ in range(trainer.optimizer.accumulate):
        batch = next(data)
        trainer.state, metrics = trainer.step(trainer.state, trainer.frozen, trainer.put(batch))
        watch.add(done, metrics, batch["index"])
    return metrics


def _take_first(trainer: Trainer, data: Iterator[Batch], done: int, watch: Watch, logs: Logs) -> dict[str, float]:
    """Takes the first step, and says how long the step and its compilation took."""
    logs.say(f"compiling the training step for {named_devices(trainer.mesh.size)}, and taking the first one ...")
    begun = time.perf_counter()
    with CompilationClock() as compilation:
        metrics = jax.device_get(_take(trainer, data, done, watch))
    seconds = time.perf_counter() - begun
    logs.say(f"step {done} took {seconds:.1f} s, of which compiling took {compilation.seconds:.1f} s")
    return {name: float(metrics[name]) for name in sorted(metrics, key=lambda name: name != "loss")}


def _make_up(
    trainer: Trainer, run: RunConfig, start: int, checkpoints: Checkpoints, logs: Logs, stop: Termination
) -> None:
    """Evaluates at the step at which a run is resumed, if that evaluation was due and did not happen."""
    due = start == run.steps or start % run.evaluate_every == 0
    if due and trainer.task.best is not None and not checkpoints.scored(start):
        scores, failure = _evaluate(trainer, start, logs, stop)
        if scores is not None:
            checkpoints.add_metrics(start, scores)
        if failure is not None:
            raise failure


def _rates(trainer: Trainer, done: int, images_per_second: float | None) -> dict[str, float]:
    rates = {"learning_rate": float(trainer.schedule(done - 1))}
    if images_per_second is None:
        return rates
    rates["images_per_second"] = images_per_second
    if work := trainer.task.work:
        rates["fraction_of_peak"] = work.flops * images_per_second / measured_peak(work.dtype)
    return rates


def _evaluate(
    trainer: Trainer, done: int, logs: Logs, stop: Termination
) -> tuple[dict[str, float] | None, BaseException | None]:
    """Returns scores, and the error that stopped the evaluation, if any: the step must still be checkpointed."""
    task, scores = trainer.task, None
    try:
        if task.evaluate is not None:
            with stop.dispensable():
                scores = task.evaluate(trainer.averaged_model())
            logs.row(done, {f"validation/{name}": value for name, value in scores.items()})
            if task.best is not None and finite(scores, task.best) is None:
                said = f"is {scores[task.best]}" if task.best in scores else "was not computed"
                logs.say(f"{task.best} of step {done} {said}: no finite number, so this step is never the best")
        if task.pictures is not None:
            with stop.dispensable():
                picture = task.pictures(trainer.averaged_model())
            logs.picture(done, picture)
    except (Exception, Terminated) as error:
        if jax.process_count() > 1:
            raise  # the other processes may not have failed, and would wait for this one
        return scores, error
    return scores, None
