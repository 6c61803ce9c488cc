"""Stores the progress of a run, shard by shard of its data set, so that an interrupted run can be resumed.

`progress/run.json` says what is measured, and `progress/NNNNNN.npz` has the counts of one shard. A file is either
complete or absent. The directory is removed once the results are written.
"""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seg4diff_jax.evaluation.counts import Counts, together
from seg4diff_jax.interrupted_runs import DIRECTORY, RUN, asked_before, begin, refuse_changes, write_whole
from seg4diff_jax.quoting import quoted

SHARD = "images_per_shard"


class Progress:
    """The finished shards of a run.

    Args:
      out: directory of the run, which need not exist.
      identity: the options that affect the scores, as plain values.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]):
        self.directory, self.identity = out / DIRECTORY, json.loads(json.dumps(identity))

    def resumed(self) -> int | None:
        """Returns the number of images per shard of the run to resume; None if there is no such run.

        Raises:
          ValueError: the run there measured something else (the message says what changed), or run.json is damaged.
        """
        former = asked_before(self.directory)
        if former is None:
            return None
        shard = former.pop(SHARD, None)
        if type(shard) is not int or shard < 1:
            raise ValueError(
                f"{self.directory / RUN}: {SHARD} is {quoted(shard)}, expected a whole number from 1: give --overwrite "
                "to begin anew"
            )
        refuse_changes(self.directory, former, self.identity)
        return shard

    def begin(self, images_per_shard: int) -> None:
        """Removes the progress of an earlier run, and sets the number of images per shard."""
        self.clear()
        self._images_per_shard = images_per_shard

    def done(self, images_per_shard: int, images: int) -> tuple[list[int], Counts | None]:
        """Returns the numbers of the finished shards, and the sum of their counts.

        A shard is not finished if its file is damaged or holds other images than those of the shard.

        Args:
          images: number of images of the whole set.
        """
        numbers: list[int] = []
        total: Counts | None = None
        for path in sorted(self.directory.glob("[0-9]*.npz")):
            try:
                number, part = int(path.stem), Counts.from_bytes(path.read_bytes())
                first = number * images_per_shard
                if part.covered() != list(range(images)[first : first + images_per_shard]):
                    raise ValueError("images of another shard")
            except (ValueError, KeyError, TypeError, OSError, EOFError, RecursionError, zipfile.BadZipFile, zlib.error):
                _remove(path)
                continue
            numbers.append(number)
            total = together([total, part] if total else [part])  # one at a time, since memory may not hold all
        return numbers, total

    def save(self, number: int, outcome: Counts) -> None:
        if not (self.directory / RUN).exists():
            begin(self.directory, {**self.identity, SHARD: self._images_per_shard})
        write_whole(self.directory, self.directory / f"{number:06d}.npz", outcome.to_bytes())

    def clear(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
