"""Caches computed items on disk as ArrayRecord, which Grain reads in any order.

DIR/items.arrayrecord   a record for each item: the bytes of its fields, one after the other, and a checksum
DIR/items.json          names, dtypes and shapes of the fields, what the items were made of, their number, a random key

ArrayRecord itself detects changed bytes. It cannot detect a record with another number, or one of another cache. So the
checksum covers the record, its number, and all of items.json.
"""

from __future__ import annotations

import json
import secrets
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.staging import staged_directory
from seg4diff_jax.data.loader import Item
from seg4diff_jax.quoting import cut, quoted

RECORDS, MANIFEST = "items.arrayrecord", "items.json"
ONE_BY_ONE = "group_size:1,uncompressed"
"""ArrayRecord's options: each record can be read by itself, uncompressed, since latents do not compress."""


class Field(NamedTuple):
    """The dtype and shape of a field, the same in every item."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * prod(self.shape)


def write_cache(
    directory: str | Path, batches: Iterable[Mapping[str, np.ndarray]], count: int, identity: Mapping[str, Any]
) -> None:
    """Writes `count` items that come in batches. The directory appears when all are written.

    Args:
      identity: plain values that say what the items were made of. `RecordCache` checks them.

    Raises:
      ValueError: the batches hold fewer or more items, or items with other fields than the first.
      OSError: the items cannot be written.
    """
    fields: dict[str, Field] = {}
    manifest = {"identity": dict(identity), "count": count, "key": secrets.token_hex(8)}
    done, seed = 0, 0
    with staged_directory(Path(directory)) as work:
        with closing(Writer(work / RECORDS)) as writer:
            for batch in batches:
                found = {name: Field(values.dtype.name, values.shape[1:]) for name, values in batch.items()}
                if not fields:
                    fields, seed = found, _seed({"fields": found, **manifest})
                if found != fields:
                    raise ValueError(f"{directory}: items of {found}; expected {fields}, as the first")
                for values in zip(*(batch[name] for name in fields), strict=True):
                    record = b"".join(np.ascontiguousarray(value).tobytes() for value in values)
                    writer.write(record + _checksum(record, done, seed))
                    done += 1
        if done != count:
            raise ValueError(f"{directory}: expected {count} items, found {done}")
        (work / MANIFEST).write_text(json.dumps({"fields": fields, **manifest}, indent=2), encoding="utf-8")


def _seed(manifest: Mapping[str, Any]) -> int:
    """Returns the seed of a cache's checksums: the checksum of its description as it is read back from the file.

    The order of the fields counts, since records hold them in this order.
    """
    return zlib.crc32(json.dumps(json.loads(json.dumps(manifest))).encode())


def _checksum(record: bytes, index: int, seed: int) -> bytes:
    return zlib.crc32(record, zlib.crc32(index.to_bytes(8, "little"), seed)).to_bytes(4, "little")


class Writer:
    """An ArrayRecord writer. It raises OSError where ArrayRecord reports file system errors as RuntimeError."""

    def __init__(self, file: Path):
        self._file, self._writer = file, ArrayRecordWriter(str(file), ONE_BY_ONE)

    def write(self, record: bytes) -> None:
        self._naming_the_file(self._writer.write, record)

    def close(self) -> None:
        self._naming_the_file(self._writer.close)

    def _naming_the_file(self, act: Callable[..., Any], *given: bytes) -> None:
        try:
            act(*given)
        except RuntimeError as error:
            raise OSError(f"{self._file} could not be written: {error}") from error


class RecordCache:
    """A random-access source of the items of a cache, as read-only arrays. Copies in worker processes reopen the file.

    Args:
      identity: what the items must have been made of.
      fields: fields of the returned items. Default: all.

    Raises:
      ValueError: the directory is no cache or is damaged, or its items were made of something else than `identity`.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, Any], fields: Sequence[str] | None = None):
        directory = Path(directory)
        if not (directory / MANIFEST).is_file():
            raise ValueError(f"{directory} is there and no cache ({MANIFEST} is missing): name another directory")
        manifest = read_json(directory / MANIFEST)
        described = _fields(manifest, directory / MANIFEST)
        made_of = manifest["identity"]
        if different := sorted(key for key in {*made_of, *identity} if made_of.get(key) != identity.get(key)):
            listing = "; ".join(
                f"{cut(key)}: {quoted(made_of.get(key))}, not {quoted(identity.get(key))}" for key in different
            )
            raise ValueError(f"{directory} was made of something else ({listing}): remove it, or name another")
        self._directory = directory
        self._seed = _seed(manifest) if "key" in manifest else None  # caches of earlier versions have no checksums
        self._records: Any = self._read(lambda: ArrayRecordDataSource(str(directory / RECORDS)))
        self._places: dict[str, tuple[int, Field]] = {}
        self._nbytes = 0
        for name, field in described.items():
            if fields is None or name in fields:
                self._places[name] = self._nbytes, field
            self._nbytes += field.nbytes
        count = manifest.get("count", len(self._records))
        if count != len(self._records):
            raise self._damaged(f"{RECORDS} has {len(self._records)} records, and {MANIFEST} {quoted(count)}")
        if len(self._records):
            self[0]  # detects the file of another cache at once

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Item:
        record = self._read(lambda: self._records[index])
        if self._seed is not None:
            record, checksum = record[:-4], record[-4:]
            if checksum != _checksum(record, index, self._seed):
                raise self._damaged(f"record {index} of {RECORDS} is not the one that {MANIFEST} describes")
        if len(record) != self._nbytes:
            raise self._damaged(f"record {index} of {RECORDS} has {len(record)} bytes, not {self._nbytes}")
        return {
            name: np.frombuffer(record, field.dtype, prod(field.shape), start).reshape(field.shape)
            for name, (start, field) in self._places.items()
        }

    def _read(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except (RuntimeError, OSError) as error:
            raise self._damaged(cut(" ".join(str(error).split()))) from error

    def _damaged(self, how: str) -> ValueError:
        return ValueError(f"{self._directory} cannot be read ({how}): remove it, and it is made anew")


def _fields(manifest: Mapping[str, Any], file: Path) -> dict[str, Field]:
    """Returns the fields that a cache's description names. Raises ValueError if it is no valid description."""
    try:
        if not isinstance(manifest["identity"], dict):
            raise TypeError("identity is no table")
        found = {name: Field(dtype, tuple(shape)) for name, (dtype, shape) in manifest["fields"].items()}
        for name, field in found.items():
            if np.dtype(field.dtype).hasobject or not all(type(size) is int and size >= 0 for size in field.shape):
                raise TypeError(f"field {cut(name)} is {cut(field.dtype)} {quoted(list(field.shape))}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else cut(str(error))
        raise ValueError(f"{file} is damaged ({reason}): remove the cache, and it is made anew") from None
    return found
