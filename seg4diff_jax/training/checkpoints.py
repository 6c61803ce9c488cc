"""Checkpoints of a run: written while training goes on, complete or absent, the last ones and the best one kept.

RUN/checkpoints/<step>/state     parameters, optimizer, average, random key (Orbax, sharded as in training)
RUN/checkpoints/<step>/data      where the data iterator stands
RUN/checkpoints/<step>/config    the resolved configuration
RUN/checkpoints/<step>/metrics   of the evaluation after that step, if there was one
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from seg4diff_jax.training.errors import TrainingError
from seg4diff_jax.training.state import TrainState

# Most steps that are checkpointed are not evaluated; Orbax warns at each.
logging.getLogger("absl").addFilter(lambda record: "tracked_metric" not in record.getMessage())


class Checkpoints:
    """The checkpoints of one run, as a context that ends when the last of them is on the disk.

    Args:
      directory: of the run.
      keep: how many of the latest are kept.
      best: metric by which one more is kept, the one with the largest value; None: no other.
    """

    def __init__(self, directory: Path, *, keep: int, best: str | None = None):
        self.directory = directory.absolute() / "checkpoints"
        kept: list[Any] = [policies.LatestN(keep)]
        metric = None if best is None else lambda metrics: float(metrics.get(best, -math.inf))
        if metric is not None:
            kept.append(policies.BestN(get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False))
        if jax.process_index() == 0:
            # Halves left by a run that was cut off. What cannot be removed now is when its step is written again.
            for half in self.directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(half, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=metric,  # with it metrics are written, and known to a run that is resumed
                enable_async_checkpointing=True,
            ),
        )

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

    def save(
        self,
        step: int,
        state: TrainState,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to write a checkpoint; `state` may be given away once this returns.

        Raises TrainingError when this or the one before cannot be written.
        """
        if step in self._manager.all_steps():
            return
        if jax.default_backend() == "cpu":
            # There the writer would read the very memory that the next step is given to write to.
            state = jax.tree.map(jnp.copy, state)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(dict(data)),
                    config=ocp.args.JsonSave(dict(config)),
                ),
                metrics=None if metrics is None else dict(metrics),
            )
        except Exception as error:  # what the disk, the network or the file system says
            raise self._failure(error) from error

    def wait(self) -> None:
        """Until all is written. Raises TrainingError when it cannot be."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> TrainingError:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        good = [path for path in self.directory.glob("[0-9]*") if path.name.isdigit()]
        last = max((int(path.name) for path in good), default=None)
        intact = "there is no earlier one" if last is None else f"the one of step {last} is intact"
        return TrainingError(
            f"{self.directory}: a checkpoint could not be written ({reason}); {intact}. "
            "Make room on the disk, then continue with --resume"
        )

    def restore(
        self, step: int, state: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """State, data position and configuration of a checkpoint.

        Args:
          state: shapes and dtypes expected.
          shardings: where each array belongs; may differ from where it lay when it was written.

        Raises:
          TrainingError: it cannot be read, or holds other parameters.
        """
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings
        )
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target),
                    data=ocp.args.JsonRestore(),
                    config=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise TrainingError(
                f"{self.directory / str(step)} cannot be resumed with this configuration: {reason}. "
                "Use the configuration that it was written with, or another run.out"
            ) from error
        return found["state"], found["data"], found["config"]
