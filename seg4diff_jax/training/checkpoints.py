"""Checkpoints of a run: written while training goes on, complete or absent, the last ones and the best one kept.

RUN/checkpoints/<step>/state       parameters, optimizer, average, random key (Orbax, sharded as in training)
RUN/checkpoints/<step>/checksums   of each array of it, and of the records below
RUN/checkpoints/<step>/data        how many batches came before
RUN/checkpoints/<step>/config      the resolved configuration
RUN/checkpoints/<step>/metrics     of the evaluation after that step, if there was one
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import cut
from seg4diff_jax.convert.run_checkpoint import (
    CHECKSUMS,
    CONFIG,
    DATA,
    METRICS,
    STATE,
    add_metrics,
    check_arrays,
    check_notes,
    checksums_to_keep,
    finite,
    read_record,
    score,
)
from seg4diff_jax.training.errors import TrainingError
from seg4diff_jax.training.state import TrainState

# Most steps that are checkpointed are not evaluated; Orbax warns at each.
logging.getLogger("absl").addFilter(lambda record: "tracked_metric" not in record.getMessage())


@dataclass(frozen=True)
class Best:
    """Keeps the checkpoint of the largest finite score, the last of equal ones. Orbax's own takes NaN for the best."""

    metric: str

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        scores = [finite(each.metrics, self.metric) for each in checkpoints]
        known = [(value, place) for place, value in enumerate(scores) if value is not None]
        _, best = max(known, default=(None, None))
        return [place == best for place in range(len(scores))]


UNREAD = re.compile(r"^[A-Z_]+: Error (opening|reading|decoding)|^Encountered error while reading")
"""How TensorStore and Orbax begin what they say of files that they cannot read."""
DETAILS = re.compile(r"\.? See full TensorStore details| \[tensorstore_spec")
"""What begins the parts of their messages that tell nothing of the fault."""


class Restored(NamedTuple):
    """What a checkpoint holds: the state, how many batches came before, and the configuration that it was written with.

    `checked`: whether it has checksums, by which all of this is what was written.
    """

    state: TrainState
    batches: int
    config: dict[str, Any]
    checked: bool


class Checkpoints:
    """The checkpoints of one run, as a context that ends when the last of them is on the disk.

    Args:
      directory: of the run.
      keep: how many of the latest are kept.
      best: metric by which one more is kept, the one with the largest finite value; None: no other.

    Raises:
      TrainingError: what is recorded of a checkpoint's evaluation is damaged.
    """

    def __init__(self, directory: Path, *, keep: int, best: str | None = None):
        self.directory = directory.absolute() / "checkpoints"
        kept: list[Any] = [policies.LatestN(keep)]
        if best is not None:
            kept.append(Best(best))
            for step in self._on_disk():  # which Orbax reads without saying of which file it speaks
                self._naming_the_step(step, lambda step=step: score(self.directory / str(step), best))
        if jax.process_index() == 0:
            # Halves left by a run that was cut off. What cannot be removed now is when its step is written again.
            for half in self.directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(half, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            # With it metrics are written, and known to a run that is resumed; `Best` compares them.
            best_fn=None if best is None else lambda metrics: metrics.get(best, 0.0),
            enable_async_checkpointing=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except Exception as error:  # what Orbax, the disk or the file system says
            raise self._unopened(error) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
        except TrainingError:
            if error is None:
                raise
        finally:
            with suppress(Exception):  # what went wrong with the last checkpoint has been said
                self._manager.close()

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def scored(self, step: int) -> bool:
        """Whether a checkpoint was written with metrics, which is only so where there is a best one."""
        return self._manager.metrics(step) is not None

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Those of a checkpoint that was written without any: it counts for the best from now on."""
        if jax.process_index() == 0:
            add_metrics(self.directory / str(step), metrics)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"metrics of step {step}")
        self._manager.reload()

    def save(
        self,
        step: int,
        state: TrainState,
        batches: int,
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to write a checkpoint; `state` may be given away once this returns.

        Args:
          batches: how many were taken.

        Raises TrainingError when this or the one before cannot be written.
        """
        if step in self._manager.all_steps():
            return
        records: dict[str, Mapping[str, Any]] = {DATA: {"batches": batches}, CONFIG: dict(config)}
        scores = {} if metrics is None else {METRICS: dict(metrics)}
        kept = checksums_to_keep(state, records | scores)
        if jax.default_backend() == "cpu":
            # There the writer would read the very memory that the next step is given to write to.
            state = jax.tree.map(jnp.copy, state)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{STATE: ocp.args.StandardSave(state), CHECKSUMS: ocp.args.JsonSave(kept)},
                    **{name: ocp.args.JsonSave(values) for name, values in records.items()},
                ),
                metrics=scores.get(METRICS),
            )
        except Exception as error:  # what the disk, the network or the file system says
            raise self._failure(error) from error

    def wait(self) -> None:
        """Until all is written. Raises TrainingError when it cannot be."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def _unopened(self, error: Exception) -> TrainingError:
        for step in self._on_disk():
            try:
                check_notes(self.directory / str(step))
            except CheckpointError as damage:
                return TrainingError(f"{damage}. Remove the file: the checkpoint is read without it")
        return TrainingError(f"{self.directory}: checkpoints cannot be read or written here ({_reason(error)})")

    def _failure(self, error: Exception) -> TrainingError:
        last = max(self._on_disk(), default=None)
        intact = "there is no earlier one" if last is None else f"the one of step {last} is intact"
        return TrainingError(
            f"{self.directory}: a checkpoint could not be written ({_reason(error)}); {intact}. "
            "Make room on the disk, then continue with --resume"
        )

    def restore(self, step: int, state: TrainState, shardings: TrainState) -> Restored:
        """What a checkpoint holds.

        Args:
          state: shapes and dtypes expected.
          shardings: where each array belongs; may differ from where it lay when it was written.

        Raises:
          TrainingError: it cannot be read, is damaged, or holds other parameters.
        """
        place = self.directory / str(step)
        config = self._naming_the_step(step, lambda: read_record(place, CONFIG))
        data = self._naming_the_step(step, lambda: read_record(place, DATA))
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings
        )
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**{STATE: ocp.args.StandardRestore(target)}))
        except Exception as error:
            reason = _reason(error)
            if isinstance(error, JSONDecodeError) or UNREAD.search(reason):
                raise TrainingError(
                    f"{place / STATE} is damaged or cannot be read ({reason}). To go on without it, "
                    f"{self._earlier(step)}"
                ) from error
            raise TrainingError(
                f"{place} cannot be resumed with this configuration: {reason}. "
                f"Use the configuration that it was written with, or another run.out; if it is damaged, "
                f"{self._earlier(step)}"
            ) from error
        checked = self._naming_the_step(step, lambda: check_arrays(place, found[STATE]))
        # Earlier versions kept Grain's position, which depends on the number of workers. The state counts too.
        batches = data.get("batches", int(found[STATE].batches))
        return Restored(found[STATE], batches, config, checked)

    def _on_disk(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.glob("[0-9]*") if path.name.isdigit())

    def _naming_the_step(self, step: int, read: Callable[[], Any]) -> Any:
        """What is read of a step; what is wrong with it, and what to do about it."""
        try:
            return read()
        except CheckpointError as error:
            raise TrainingError(f"{error}. To go on without it, {self._earlier(step)}") from None

    def _earlier(self, step: int) -> str:
        before = max((each for each in self._on_disk() if each < step), default=None)
        where = "begins anew" if before is None else f"goes on from step {before}"
        return f"move {self.directory / str(step)} elsewhere: --resume then {where}"


def _reason(error: Exception) -> str:
    """The first line of what a library says, without TensorStore's own account of what it was asked."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return cut(DETAILS.split(line)[0], 600)
