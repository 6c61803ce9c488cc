"""PyTorch's arrays recorded, ours checked against them, and the bounds that they must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

RELATIVE = 1e-4
"""fp32: largest absolute error over the reference's largest absolute value, at most."""
EQUAL = 0.9999
"""fp32: fraction of equal labels, at least."""
FACTOR, ROUNDING = 2.0, 2**-9
"""bf16: our distance from PyTorch in fp32 is at most FACTOR times that of PyTorch in bf16, plus half a unit in the last
place of 1. What bf16 costs depends on the weights: without norms on q and k PyTorch itself is off by a tenth and more
after a few blocks, so no fixed bound would both pass sound numbers and catch unsound ones."""
LABEL_FACTOR, LABEL_ROUNDING = 3.0, 0.01
"""The same for the fractions of labels that differ, which are few and jump."""
BOUNDS = {
    "float32": f"error at most {RELATIVE:.0e} of the largest reference value, at least {100 * EQUAL} % equal labels",
    "bfloat16": f"RMS distance from PyTorch in fp32 at most {FACTOR} times that of PyTorch in bf16, plus "
    f"{ROUNDING:.1e}; differing labels {LABEL_FACTOR} times, plus {100 * LABEL_ROUNDING:g} %",
}
"""In words, by the dtype that both frameworks compute in."""


@dataclass(frozen=True)
class Row:
    """One comparison of our array with PyTorch's in the same dtype.

    Attributes:
      max_error, relative_error, cosine: None for label maps. The relative error is the largest absolute error over the
        reference's largest absolute value.
      equal: fraction of equal labels; None for all else.
      distance, reference_distance: in bf16, how far ours and PyTorch's are from PyTorch in fp32: RMS of the difference
        over RMS of the value, or the fraction of differing labels.
    """

    what: str
    shape: tuple[int, ...]
    max_error: float | None
    relative_error: float | None
    cosine: float | None
    equal: float | None
    distance: float | None
    reference_distance: float | None
    bound: str
    passed: bool


class Recording:
    """Arrays by name, each in a file of its own: at 1024 pixels the maps of one transformer take gigabytes."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, Path] = {}
        folder.mkdir()

    def record(self, what: str, array: Shaped[np.ndarray, "..."]) -> None:
        if what in self._files:
            raise ValueError(f"{what} is recorded twice")
        self._files[what] = self._folder / f"{len(self._files)}.npy"
        np.save(self._files[what], array)

    def take(self, what: str) -> Shaped[np.ndarray, "..."]:
        """The array, whose file is then removed."""
        path = self._files[what]
        array = np.load(path)
        path.unlink()
        return array

    @property
    def left(self) -> list[str]:
        return [what for what, path in self._files.items() if path.exists()]


def compare(
    what: str,
    ours: Shaped[np.ndarray, "..."],
    theirs: Shaped[np.ndarray, "..."],
    exact: Shaped[np.ndarray, "..."] | None = None,
) -> Row:
    """The row of two arrays of one shape; label maps are those of integers. What is not finite never passes.

    Args:
      exact: PyTorch's in fp32, if the other two are in bf16.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{what}: PyTorch's shape is {list(theirs.shape)}, ours is {list(ours.shape)}")
    labels = np.issubdtype(theirs.dtype, np.integer)
    equal = float((ours == theirs).mean()) if labels else None
    numbers = (None, None, None) if labels else _errors(ours.astype(np.float64), theirs.astype(np.float64))
    if exact is not None:
        distances = _distance(ours, exact, labels), _distance(theirs, exact, labels)
        factor, rounding = (LABEL_FACTOR, LABEL_ROUNDING) if labels else (FACTOR, ROUNDING)
        limit = factor * distances[1] + rounding
        bound, passed = f"{distances[0]:.1e} <= {limit:.1e} from fp32", distances[0] <= limit
    else:
        distances = None, None
        passed = equal >= EQUAL if equal is not None else numbers[1] is not None and numbers[1] <= RELATIVE
        bound = f">= {100 * EQUAL:g} %" if labels else f"<= {RELATIVE:.0e}"
    return Row(what, theirs.shape, *numbers, equal, *distances, bound, passed)


def _errors(ours: Shaped[np.ndarray, "..."], theirs: Shaped[np.ndarray, "..."]) -> tuple[float, float, float]:
    """Largest absolute error, the same over the largest absolute value of `theirs`, and cosine."""
    error, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    lengths = math.sqrt(float((ours**2).sum()) * float((theirs**2).sum()))
    cosine = float((ours * theirs).sum()) / lengths if lengths else float(error == 0)
    return error, _ratio(error, largest), cosine


def _distance(array: Shaped[np.ndarray, "..."], exact: Shaped[np.ndarray, "..."], labels: bool) -> float:
    if labels:
        return float((array != exact).mean())
    exact = exact.astype(np.float64)
    return _ratio(math.sqrt(float(((array - exact) ** 2).sum())), math.sqrt(float((exact**2).sum())))


def _ratio(error: float, size: float) -> float:
    return error / size if size else (0.0 if error == 0 else math.inf)
