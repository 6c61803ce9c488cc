"""A directory that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seg4diff_jax.convert.errors import CheckpointError


def check_target(target: Path, *, overwrite: bool, marker: str) -> None:
    """Raise CheckpointError unless `target` may be written.

    Args:
      overwrite: an existing directory may be replaced.
      marker: a file that says a directory is of the kind that may be: nothing else is ever deleted.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target.is_dir() and (target / marker).is_file()):
        raise CheckpointError(f"{target} exists and is not a checkpoint (it has no {marker}): choose another name")
    if not overwrite:
        raise CheckpointError(f"{target} exists: choose another name, or give --overwrite to replace it")


def _beside(target: Path) -> tuple[Path, Path]:
    """Where a new target grows and where the one that it replaces waits to be deleted."""
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.replaced")


def is_leftover(path: Path) -> bool:
    """Whether a directory is what an interrupted run has left, by its name."""
    return path.name.startswith(".") and path.name.endswith((".partial", ".replaced"))


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its name and place when the block ends without an error.

    Whatever happens, kill -9 and loss of power included, `target` is as it was, or absent, or complete. What an
    interrupted run has left is removed by the next one.

    Raises CheckpointError when another process is writing the same target.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    work, former = _beside(target)
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{target}: another process is writing it") from None
        for leftover in [*work.iterdir(), former]:
            _remove(leftover)
        try:
            yield work
            os.sync()  # one call for thousands of small files, each of whose own would be a disk transaction
            if target.exists():
                target.rename(former)
            work.rename(target)
            _sync(target.parent)
        except BaseException:
            _remove(work)
            raise
        _remove(former)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path | str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
