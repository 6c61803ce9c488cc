"""Items computed once and kept on the disk: one `.npy` file per field, mapped into memory.

Records are of one size, so item i is at a known place of each file: reading one costs a page fault and no decoding,
worker processes share the pages, and NumPy alone reads the files.

    DIR/latents.npy  DIR/clip_l.npy ...   the first axis counts items
    DIR/cache.json                        what the items were made of
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.staging import staged_directory
from seg4diff_jax.data.loader import Item

MANIFEST = "cache.json"


def write_cache(
    directory: str | Path, batches: Iterable[Mapping[str, np.ndarray]], count: int, identity: Mapping[str, Any]
) -> None:
    """Write `count` items that come in batches; the directory appears when all are there.

    Args:
      identity: plain values that say what the items were made of; `ArrayCache` refuses other items.

    Raises:
      ValueError: the batches hold fewer or more items.
    """
    with staged_directory(Path(directory)) as work:
        files: dict[str, np.memmap] = {}
        done = 0
        for batch in batches:
            size = len(next(iter(batch.values())))
            if done + size > count:
                raise ValueError(f"{directory}: expected {count} items, found more")
            for field, values in batch.items():
                if field not in files:
                    shape = (count, *values.shape[1:])
                    files[field] = np.lib.format.open_memmap(work / f"{field}.npy", "w+", values.dtype, shape)
                files[field][done : done + size] = values
            done += size
        if done != count:
            raise ValueError(f"{directory}: expected {count} items, found {done}")
        for file in files.values():
            file.flush()
        manifest = {"count": count, "fields": sorted(files), "identity": dict(identity)}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2))


class ArrayCache:
    """The items of a cache. Copies that go to worker processes map the files anew.

    Args:
      identity: what the items must be made of.
      fields: those that items have; the files of others are not read. Default: all.

    Raises:
      ValueError: the directory is no cache, or its items were made of something else than `identity`.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, Any], fields: Sequence[str] | None = None):
        self.directory = Path(directory)
        if not (self.directory / MANIFEST).is_file():
            raise ValueError(f"{self.directory} is there and no cache ({MANIFEST} is missing): name another directory")
        manifest = json.loads((self.directory / MANIFEST).read_text())
        made_of = manifest["identity"]
        if different := sorted(key for key in {*made_of, *identity} if made_of.get(key) != identity.get(key)):
            listing = "; ".join(f"{key}: {made_of.get(key)!r}, not {identity.get(key)!r}" for key in different)
            raise ValueError(f"{self.directory} was made of something else ({listing}): remove it, or name another")
        self.count, self.fields = manifest["count"], list(fields or manifest["fields"])
        self._arrays: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Item:
        if not self._arrays:
            self._arrays = {field: np.load(self.directory / f"{field}.npy", mmap_mode="r") for field in self.fields}
        return {field: np.asarray(array[index]) for field, array in self._arrays.items()}
