"""The counts over a part of a data set. Counts of several parts can be added, and stored in a file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from typing import Any, TypeVar, cast

import numpy as np
from jaxtyping import Float, Int

from seg4diff_jax.convert.files import parse_json
from seg4diff_jax.evaluation.batches import LeftOut
from seg4diff_jax.evaluation.further import FurtherCounts
from seg4diff_jax.evaluation.unsupervised import SegmentCounts
from seg4diff_jax.evaluation.zero_shot import ConfusionCounts

LEFT_OUT, CHECKSUM = "left_out", "checksum"
COUNTS_OF = {"counted": ConfusionCounts, "further": FurtherCounts, "matched": SegmentCounts}
PER_IMAGE = ("right", "presence", "average_precision")
"""Arrays of these whose last axis is images; all others are sums over images."""
Kind = TypeVar("Kind", ConfusionCounts, FurtherCounts, SegmentCounts)


@dataclass(frozen=True)
class Counts:
    """The counts from which all scores are computed and pictures are chosen.

    Attributes:
      counted, matched: counts of the open-vocabulary and of the unsupervised protocol; no passes if not measured.
      further: counts of figures beside mIoU, of the open-vocabulary protocol.
      indices: numbers of the scored images.
      histograms: number of counted pixels of each class, for each scored image.
      cut_off: number of pixels that would count, had they a prediction, for each scored image, see `batches.Example`.
      forwards: how often one pass ran the transformer, for each kind of prompts; the empty prompt comes last.
      seconds: seconds of compiling and of running. With several processes, each one's share of the common time.
      left_out: the images that were not scored.
    """

    counted: ConfusionCounts
    further: FurtherCounts
    matched: SegmentCounts
    indices: Int[np.ndarray, " images"]
    histograms: Int[np.ndarray, "images classes"]
    cut_off: Int[np.ndarray, " images"]
    forwards: Int[np.ndarray, " prompts"]
    seconds: Float[np.ndarray, 2]
    left_out: tuple[LeftOut, ...]

    def covered(self) -> list[int]:
        """Returns the numbers of all images that were scored or left out, ascending."""
        return sorted([*self.indices.tolist(), *(each.index for each in self.left_out)])

    def to_bytes(self) -> bytes:
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ARRAYS}
        for protocol in COUNTS_OF:
            arrays |= {f"{protocol}.{name}": each for name, each in getattr(self, protocol)._asdict().items()}
        arrays[LEFT_OUT] = np.array(json.dumps(self.left_out))
        arrays[CHECKSUM] = np.array(_checksum(arrays))
        file = BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, contents: bytes) -> Counts:
        """Reads the bytes of `to_bytes`. Raises ValueError, KeyError, OSError or zipfile.BadZipFile for others."""
        with np.load(BytesIO(contents), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if arrays.pop(CHECKSUM) != _checksum(arrays):
            raise ValueError("the arrays are not those that were written")
        parts: dict[str, Any] = {
            protocol: kind(*(arrays[f"{protocol}.{name}"] for name in kind._fields))
            for protocol, kind in COUNTS_OF.items()
        }
        left_out = tuple(LeftOut(*each) for each in parse_json(str(arrays[LEFT_OUT]), LEFT_OUT))
        return cls(left_out=left_out, **parts, **{name: arrays[name] for name in ARRAYS})


ARRAYS = [field.name for field in fields(Counts) if field.name not in (*COUNTS_OF, LEFT_OUT)]


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """Returns one checksum over all arrays and their names. The archive's own checksums cover single arrays only."""
    found = 0
    for name in sorted(arrays):
        array = arrays[name]
        found = zlib.crc32(array.tobytes(), zlib.crc32(f"{name} {array.dtype.str} {array.shape}".encode(), found))
    return found


def together(parts: Sequence[Counts]) -> Counts:
    """Adds the counts of parts of one set, at least one part. Images are sorted by number."""
    indices = np.concatenate([part.indices for part in parts])
    order = np.argsort(indices, kind="stable")
    return Counts(
        _added([part.counted for part in parts], order),
        _added([part.further for part in parts], order),
        _added([part.matched for part in parts], order),
        indices[order],
        np.concatenate([part.histograms for part in parts])[order],
        np.concatenate([part.cut_off for part in parts])[order],
        cast(np.ndarray, sum(part.forwards for part in parts)),
        cast(np.ndarray, sum(part.seconds for part in parts)),
        tuple(sorted(each for part in parts for each in part.left_out)),
    )


def _added(parts: Sequence[Kind], order: Int[np.ndarray, " images"]) -> Kind:
    """Adds the counts of one protocol. Numbers per image are put into the given order."""

    def added(name: str) -> np.ndarray:
        arrays = [getattr(part, name) for part in parts]
        if name not in PER_IMAGE:
            return cast(np.ndarray, sum(arrays))
        joined = np.concatenate(arrays, axis=-1)
        return joined[..., order] if joined.size else joined  # what was not measured has no images

    return type(parts[0])._make(map(added, parts[0]._fields))
