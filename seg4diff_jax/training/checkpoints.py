"""Writes and reads the checkpoints of a run. The last ones and the best one are kept.

Checkpoints are written while training continues. A checkpoint is either complete or absent.

RUN/checkpoints/<step>/state       parameters, optimizer, average, random key (Orbax, sharded as in training)
RUN/checkpoints/<step>/checksums   checksums of each array of the state, and of the records below
RUN/checkpoints/<step>/data        how many batches were taken before
RUN/checkpoints/<step>/config      the resolved configuration
RUN/checkpoints/<step>/metrics     metrics of the evaluation after that step, if there was one
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
from seg4diff_jax.quoting import cut
from seg4diff_jax.training.errors import TrainingError
from seg4diff_jax.training.state import TrainState

# Most checkpointed steps are not evaluated, and Orbax would warn at each of them.
logging.getLogger("absl").addFilter(lambda record: "tracked_metric" not in record.getMessage())


@dataclass(frozen=True)
class Best:
    """Keeps the checkpoint with the largest finite score; of equal scores, the last. Orbax's own policy keeps NaN."""

    metric: str

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        scores = [finite(each.metrics, self.metric) for each in checkpoints]
        known = [(value, place) for place, value in enumerate(scores) if value is not None]
        _, best = max(known, default=(None, None))
        return [place == best for place in range(len(scores))]


UNREAD = re.compile(r"^[A-Z_]+: Error (opening|reading|decoding)|^Encountered error while reading")
"""Matches the messages of TensorStore and Orbax about files that they cannot read."""
DETAILS = re.compile(r"\.? See full TensorStore details| \[tensorstore_spec")
"""Matches the start of the parts of these messages that do not describe the fault."""


class Restored(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
      state: the training state.
      batches: how many batches were taken before.
      config: the configuration of the run that wrote the checkpoint.
      checked: whether the checkpoint has checksums, all of which agreed.
    """

    state: TrainState
    batches: int
    config: dict[str, Any]
    checked: bool


class Checkpoints:
    """The checkpoints of one run, as a context manager. The context ends when all checkpoints are on the disk.

    Args:
      directory: directory of the run.
      keep: how many of the latest checkpoints are kept.
      best: metric whose largest finite value marks one more checkpoint to keep; None: only the latest are kept.

    Raises:
      TrainingError: the record of a checkpoint's evaluation is damaged.
    """

    def __init__(self, directory: Path, *, keep: int, best: str | None = None):
        self.directory = directory.absolute() / "checkpoints"
        kept: list[Any] = [policies.LatestN(keep)]
        if best is not None:
            kept.append(Best(best))
            for step in self._on_disk():  # Orbax reads the same, and its errors do not name the file
                self._naming_the_step(step, lambda step=step: score(self.directory / str(step), best))
        if jax.process_index() == 0:
            # Unfinished checkpoints of a run that was killed. Those that cannot be removed now are removed when their
            # step is written again.
            for half in self.directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(half, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            # Only with `best_fn` does Orbax write metrics and know them after a resume. `Best` does the comparing.
            best_fn=None if best is None else lambda metrics: metrics.get(best, 0.0),
            enable_async_checkpointing=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except Exception as error:  # from Orbax, the disk or the file system
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
            with suppress(Exception):  # `wait` has reported what failed
                self._manager.close()

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def scored(self, step: int) -> bool:
        """Whether a checkpoint has metrics. Metrics are only written if `best` is given."""
        return self._manager.metrics(step) is not None

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics to a checkpoint that was written without them, so that it can become the best one."""
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
        """Starts to write a checkpoint. `state` may be donated once this returns.

        Args:
          batches: how many batches were taken.

        Raises:
          TrainingError: this checkpoint or the one before cannot be written.
        """
        if step in self._manager.all_steps():
            return
        records: dict[str, Mapping[str, Any]] = {DATA: {"batches": batches}, CONFIG: dict(config)}
        scores = {} if metrics is None else {METRICS: dict(metrics)}
        kept = checksums_to_keep(state, records | scores)
        if jax.default_backend() == "cpu":
            # On a CPU the writer would read the memory that is donated to the next step.
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
        except Exception as error:  # from the disk, the network or the file system
            raise self._failure(error) from error

    def wait(self) -> None:
        """Waits until all checkpoints are written. Raises TrainingError when one cannot be."""
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
        """Reads a checkpoint.

        Args:
          state: the expected shapes and dtypes.
          shardings: the sharding of each array, which may differ from that in the run that wrote it.

        Raises:
          TrainingError: the checkpoint cannot be read, is damaged, or holds other parameters.
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
        # Earlier versions stored Grain's position instead, which depends on the number of workers. The state has the
        # same count.
        batches = data.get("batches", int(found[STATE].batches))
        return Restored(found[STATE], batches, config, checked)

    def _on_disk(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.glob("[0-9]*") if path.name.isdigit())

    def _naming_the_step(self, step: int, read: Callable[[], Any]) -> Any:
        """Returns `read()`. If the step is damaged, the TrainingError says what is wrong and what to do."""
        try:
            return read()
        except CheckpointError as error:
            raise TrainingError(f"{error}. To go on without it, {self._earlier(step)}") from None

    def _earlier(self, step: int) -> str:
        before = max((each for each in self._on_disk() if each < step), default=None)
        where = "begins anew" if before is None else f"goes on from step {before}"
        return f"move {self.directory / str(step)} elsewhere: --resume then {where}"


def _reason(error: Exception) -> str:
    """Returns the first line of a library's message, without TensorStore's description of the request."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return cut(DETAILS.split(line)[0], 600)
