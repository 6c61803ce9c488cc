"""Writes a directory that appears complete or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seg4diff_jax.convert.errors import CheckpointError


def check_target(target: Path, *, overwrite: bool, marker: str) -> None:
    """Raises CheckpointError unless `target` may be written.

    Args:
      overwrite: an existing directory may be replaced.
      marker: a file that shows that a directory may be replaced. Nothing without it is ever deleted.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target.is_dir() and (target / marker).is_file()):
        raise CheckpointError(f"{target} exists and is not a checkpoint (it has no {marker}): choose another name")
    if not overwrite:
        raise CheckpointError(f"{target} exists: choose another name, or give --overwrite to replace it")


def _beside(target: Path) -> tuple[Path, Path]:
    """Returns the path at which a new target is written, and the path of the replaced one until it is deleted."""
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.replaced")


def is_leftover(path: Path) -> bool:
    """Whether a directory, by its name, was left by an interrupted run."""
    return path.name.startswith(".") and path.name.endswith((".partial", ".replaced"))


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory beside `target` that becomes `target` when the block ends without an error.

    Whatever happens, kill -9 and loss of power included, `target` is as it was, or absent, or complete. The next run
    removes what an interrupted run has left.

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
            os.sync()  # one call for thousands of small files: syncing each would cost a disk transaction per file
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
