"""A file with the structure of `gtsegs_ijcv.mat`: a struct array of MATLAB's version 7.3, as HDF5 has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WORDS = "n01440764\ttench, Tinca tinca\nn02084071\tdog, domestic dog, Canis familiaris\nn02124075\tEgyptian cat\n"
HEADER = b"MATLAB 7.3 MAT-file, Platform: GLNXA64"


class Record(NamedTuple):
    """One image: uint8 [height, width, 3], its mask [height, width] of 0 and 1, and its id."""

    image: np.ndarray
    mask: np.ndarray
    name: str


def write_matlab(file: Path, records: Sequence[Record], **instead: Any) -> Path:
    """Writes records. Arrays are stored with their axes reversed, and are referred to from `value`.

    Args:
      instead: what to write in place of a member of `value`; None leaves it out.
    """
    import h5py

    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w", userblock_size=512) as opened:
        kept = opened.create_group("#refs#")

        def refer(array: np.ndarray) -> Any:
            return kept.create_dataset(f"r{len(kept)}", data=array).ref

        def cells(references: Sequence[Any]) -> np.ndarray:
            return np.array([[each] for each in references], dtype=h5py.ref_dtype)

        def mask(record: Record) -> Any:
            return refer(cells([refer(record.mask.astype(np.uint8).T)]))

        def characters(text: str) -> Any:
            return refer(np.array([[ord(each)] for each in text], np.uint16))

        members = {
            "img": cells([refer(record.image.transpose(2, 1, 0)) for record in records]),
            "gt": cells([mask(record) for record in records]),
            "id": cells([characters(record.name) for record in records]),
            "target": cells([refer(np.array([[1.0]])) for _ in records]),
        }
        for name, member in (members | instead).items():
            if member is not None:
                opened.create_dataset(f"value/{name}", data=member)
    with file.open("r+b") as opened:
        opened.write(HEADER)
    return file


def some_records(*sizes: tuple[int, int]) -> list[Record]:
    """Images of noise, whose object is a rectangle; their classes are those of `WORDS` in turn."""
    found = []
    for number, (height, width) in enumerate(sizes):
        draw = np.random.default_rng(number)
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 2 + number % 2, width // 4 :] = 1
        image = draw.integers(0, 256, (height, width, 3), np.uint8)
        found.append(Record(image, mask, f"{WORDS.splitlines()[number % 3].split()[0]}_{number + 7}"))
    return found
