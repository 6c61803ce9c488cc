"""Items computed once and kept on the disk as ArrayRecord, which grain reads in any order.

DIR/items.arrayrecord   a record per item: its fields' bytes, one after the other
DIR/items.json          the fields' names, dtypes and shapes, and what the items were made of
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from convert.staging import staged_directory
from seg4diff_jax.data.loader import Item

RECORDS, MANIFEST = "items.arrayrecord", "items.json"
ONE_BY_ONE = "group_size:1,uncompressed"
"""How records are written: each can be read without others. Latents do not compress."""


class Field(NamedTuple):
    """An array's form, the same in every item."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * prod(self.shape)


def write_cache(
    directory: str | Path, batches: Iterable[Mapping[str, np.ndarray]], count: int, identity: Mapping[str, Any]
) -> None:
    """Write `count` items that come in batches; the directory appears when all are there.

    Args:
      identity: plain values that say what the items were made of; `RecordCache` refuses other items.

    Raises:
      ValueError: the batches hold fewer or more items, or items of other fields than the first.
      OSError: the disk does not take them.
    """
    fields: dict[str, Field] = {}
    done = 0
    with staged_directory(Path(directory)) as work:
        with closing(Writer(work / RECORDS)) as writer:
            for batch in batches:
                found = {name: Field(values.dtype.name, values.shape[1:]) for name, values in batch.items()}
                fields = fields or found
                if found != fields:
                    raise ValueError(f"{directory}: items of {found}; expected {fields}, as the first")
                for values in zip(*(batch[name] for name in fields), strict=True):
                    writer.write(b"".join(np.ascontiguousarray(value).tobytes() for value in values))
                    done += 1
        if done != count:
            raise ValueError(f"{directory}: expected {count} items, found {done}")
        (work / MANIFEST).write_text(json.dumps({"fields": fields, "identity": dict(identity)}, indent=2))


class Writer:
    """ArrayRecord's, which says what the file system says in RuntimeErrors: OSErrors of these."""

    def __init__(self, file: Path):
        self._file, self._writer = file, ArrayRecordWriter(str(file), ONE_BY_ONE)

    def write(self, record: bytes) -> None:
        self._told(self._writer.write, record)

    def close(self) -> None:
        self._told(self._writer.close)

    def _told(self, act: Callable[..., Any], *given: bytes) -> None:
        try:
            act(*given)
        except RuntimeError as error:
            raise OSError(f"{self._file} could not be written: {error}") from error


class RecordCache:
    """The items of a cache, read-only arrays. Copies that go to worker processes open the file anew.

    Args:
      identity: what the items must be made of.
      fields: those that items have. Default: all.

    Raises:
      ValueError: the directory is no cache or damaged, or its items were made of something else than `identity`.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, Any], fields: Sequence[str] | None = None):
        directory = Path(directory)
        if not (directory / MANIFEST).is_file():
            raise ValueError(f"{directory} is there and no cache ({MANIFEST} is missing): name another directory")
        manifest = json.loads((directory / MANIFEST).read_text())
        made_of = manifest["identity"]
        if different := sorted(key for key in {*made_of, *identity} if made_of.get(key) != identity.get(key)):
            listing = "; ".join(f"{key}: {made_of.get(key)!r}, not {identity.get(key)!r}" for key in different)
            raise ValueError(f"{directory} was made of something else ({listing}): remove it, or name another")
        self._directory = directory
        self._records: Any = self._read(lambda: ArrayRecordDataSource(str(directory / RECORDS)))
        self._places: dict[str, tuple[int, Field]] = {}
        start = 0
        for name, (dtype, shape) in manifest["fields"].items():
            field = Field(dtype, tuple(shape))
            if fields is None or name in fields:
                self._places[name] = start, field
            start += field.nbytes

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Item:
        record = self._read(lambda: self._records[index])
        return {
            name: np.frombuffer(record, field.dtype, prod(field.shape), start).reshape(field.shape)
            for name, (start, field) in self._places.items()
        }

    def _read(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{self._directory} cannot be read ({error}): remove it, and it is made anew") from error
