"""Records PyTorch's arrays, and compares ours with them within bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Shaped

FACTOR, LABEL_FACTOR = 2.0, 3.0
"""How many times farther than PyTorch's our array may be from the exact one.

Labels have a factor of their own: few of them differ, so that their number jumps.
"""


@dataclass(frozen=True)
class Bounds:
    """The bounds of a row, in one dtype.

    A row passes by `relative` or `equal` or else, if an exact array is known, by `rounding` or `label_rounding`.

    Attributes:
      relative: largest absolute error over the reference's largest absolute value, at most; None: no row passes by it.
      equal: fraction of equal labels among the decided ones, at least; None: no row passes by it.
      rounding: our distance from the exact array is at most FACTOR times PyTorch's plus this.
      label_rounding: as `rounding`, with LABEL_FACTOR, for the fraction of labels that differ.
    """

    relative: float | None
    equal: float | None
    rounding: float
    label_rounding: float


BOUNDS = {"float32": Bounds(1e-4, 1.0, 1e-6, 1e-4), "bfloat16": Bounds(None, None, 2**-9, 0.01)}
"""Bounds by the dtype that both compute in.

The error that rounding causes depends on the weights. Where attention is sharp, as it can be without norms on q and k,
PyTorch itself in bf16 is off by a tenth and more after a few blocks. So in bf16 no fixed bound would both pass sound
numbers and catch unsound ones. The measure is the distance of PyTorch in bf16 from PyTorch in fp32.
"""


@dataclass(frozen=True)
class Comparison:
    """One comparison of our array with PyTorch's in the same dtype.

    Attributes:
      max_error, relative_error, cosine: None for label maps. The relative error is the largest absolute error over the
        reference's largest absolute value.
      equal: fraction of equal labels, of those that are `decided`; None for all else.
      decided: fraction of labels that are decided (`decided_labels`); None for all else.
      distance, reference_distance: how far ours and PyTorch's are from PyTorch in a wider dtype, if that was run: RMS
        of the difference over RMS of the value, or the fraction of differing labels.
    """

    what: str
    shape: tuple[int, ...]
    max_error: float | None
    relative_error: float | None
    cosine: float | None
    equal: float | None
    decided: float | None
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

    def record(self, what: str, array: Shaped[np.ndarray, "*array"]) -> None:
        if what in self._files:
            raise ValueError(f"{what} is recorded twice")
        self._files[what] = self._folder / f"{len(self._files)}.npy"
        np.save(self._files[what], array)

    def take(self, what: str) -> Shaped[np.ndarray, "*array"]:
        """Returns an array and removes its file."""
        path = self._files[what]
        array = np.load(path)
        path.unlink()
        return array

    @property
    def left(self) -> list[str]:
        return [what for what, path in self._files.items() if path.exists()]


def compare(
    what: str,
    ours: Shaped[np.ndarray, "*ours"],
    theirs: Shaped[np.ndarray, "*theirs"],
    exact: Shaped[np.ndarray, "*exact"] | None = None,
    bounds: Bounds = BOUNDS["float32"],
    decided: Bool[np.ndarray, "*theirs"] | None = None,
) -> Comparison:
    """Compares two arrays of one shape; arrays of integers are label maps. Values that are not finite never pass.

    Args:
      exact: PyTorch's array in a wider dtype.
      decided: the labels that rounding cannot change, see `decided_labels`. Default: all.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{what}: PyTorch's shape is {list(theirs.shape)}, ours is {list(ours.shape)}")
    labels = np.issubdtype(theirs.dtype, np.integer)
    if labels:
        error = relative = cosine = None
        decided = np.ones(theirs.shape, bool) if decided is None else decided
        share = float(decided.mean())
        equal = float((ours == theirs)[decided].mean()) if share else 0.0
        passed = bounds.equal is not None and equal >= bounds.equal
        bound = f">= {100 * (bounds.equal or 0):g} % of the decided {100 * share:.6g} %"
    else:
        error, relative, cosine = _errors(ours.astype(np.float64), theirs.astype(np.float64))
        equal = share = None
        passed = bounds.relative is not None and relative <= bounds.relative
        bound = f"<= {bounds.relative or 0:.0e}"
    distances = None, None
    if exact is not None:
        distances = _distance(ours, exact, labels), _distance(theirs, exact, labels)
        factor, rounding = (LABEL_FACTOR, bounds.label_rounding) if labels else (FACTOR, bounds.rounding)
        limit = factor * distances[1] + rounding
        if not passed:
            bound, passed = f"{distances[0]:.1e} <= {limit:.1e} from exact", distances[0] <= limit
    return Comparison(what, theirs.shape, error, relative, cosine, equal, share, *distances, bound, passed)


def decided_labels(
    ours: Float[np.ndarray, "classes height width"], theirs: Float[np.ndarray, "classes height width"]
) -> Bool[np.ndarray, "height width"]:
    """Returns the pixels whose labels rounding cannot change.

    In these pixels PyTorch's best class leads the second by more than twice the largest difference between our scores
    and PyTorch's. If a score is not finite, no label is decided.
    """
    if len(theirs) == 1:
        return np.ones(theirs.shape[1:], bool)
    second, best = np.partition(theirs.astype(np.float64), -2, axis=0)[-2:]
    return best - second > 2 * np.abs(ours.astype(np.float64) - theirs).max()


def _errors(ours: Shaped[np.ndarray, "*ours"], theirs: Shaped[np.ndarray, "*theirs"]) -> tuple[float, float, float]:
    """Returns the largest absolute error, this error over the largest absolute value of `theirs`, and the cosine."""
    error, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    lengths = math.sqrt(float((ours**2).sum()) * float((theirs**2).sum()))
    cosine = float((ours * theirs).sum()) / lengths if lengths else float(error == 0)
    return error, _ratio(error, largest), cosine


def _distance(array: Shaped[np.ndarray, "*array"], exact: Shaped[np.ndarray, "*exact"], labels: bool) -> float:
    if labels:
        return float((array != exact).mean())
    exact = exact.astype(np.float64)
    return _ratio(math.sqrt(float(((array - exact) ** 2).sum())), math.sqrt(float((exact**2).sum())))


def _ratio(error: float, size: float) -> float:
    return error / size if size else (0.0 if error == 0 else math.inf)
