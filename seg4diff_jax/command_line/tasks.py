"""The tasks that `train.py` can train, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from seg4diff_jax.magnet import task as magnet
from seg4diff_jax.miniature import autoencoder, contrastive, flow_matching
from seg4diff_jax.training.loop import Task


class Entry(NamedTuple):
    """A task's configuration class, with the fields `run` and `optimizer`, and the function that makes the task."""

    config: type
    make: Callable[[Any], Task]


TASKS = {
    "autoencoder": Entry(autoencoder.AutoencoderConfig, autoencoder.task),
    "contrastive": Entry(contrastive.ContrastiveConfig, contrastive.task),
    "flow_matching": Entry(flow_matching.FlowMatchingConfig, flow_matching.task),
    "magnet": Entry(magnet.MagnetConfig, magnet.task),
}
