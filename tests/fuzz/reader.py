"""What the fuzzer has to know of a reader, and what may be damaged in files of each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.images import ImageError
from seg4diff_jax.training.errors import TrainingError

OWN_ERRORS = (CheckpointError, FolderError, ImageError, TrainingError)


@dataclass(frozen=True)
class Damage:
    """One way to damage a file.

    Attributes:
      name: of the kind.
      apply: changes the file with numbers drawn from the generator, and says where and how.
      noticed: whether the damaged file shows that it is damaged. Where it does not, as where a letter of a caption is
        another, what is read may differ; the reading must still end, in an error of ours or in a value.
    """

    name: str
    apply: Callable[[np.random.Generator, Path], str]
    noticed: bool = True


class Inapplicable(Exception):
    """The file has nothing that could be damaged in this way."""


@dataclass(frozen=True)
class Reader:
    """A reader of files and what it is given.

    Attributes:
      make: writes a small sound input into an empty directory.
      read: what is read of it: arrays, configurations, plain values, and containers of them; no paths.
      modules: of ours that open these files.
      files: pattern of the files that are damaged to what they hold, a key of `contents.CONTENTS`.
      free: patterns of damages after which another reading is right, as they are described in a case's line; each with
        the reason.
      errors: classes in which it refuses.
      options: whether the files hold options: then a refusal may name the option in place of the file.
      cases: how many the quick tests have.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    modules: tuple[str, ...]
    files: Mapping[str, str]
    free: Mapping[str, str] = field(default_factory=dict)
    errors: tuple[type[BaseException], ...] = OWN_ERRORS
    options: bool = False
    cases: int = 10
