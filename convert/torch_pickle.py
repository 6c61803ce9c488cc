"""PyTorch's pickled files, read without running what they say, and written. Needs PyTorch, and says so."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.errors import CheckpointError
from convert.layout import contiguous

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8")


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: PyTorch's pickled files need PyTorch: install seg4diff-jax[convert], or use a safetensors format"
        ) from None
    return torch


def _latin1(text: str, encoding: str) -> bytes:
    """What pickle's second protocol calls to make bytes of text; only in the encoding that it uses."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode(encoding)


def _numpy_makers() -> list[Any]:
    """What pickled NumPy arrays of numbers refer to: none of it runs anything that the file brings."""
    reconstruct, _, _ = np.empty(0).__reduce__()
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since NumPy 2
    makers: list[Any] = [(reconstruct, f"{module}._reconstruct") for module in modules]
    return [*makers, (_latin1, "_codecs.encode"), np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in NUMBERS)]


def load_pickle(path: Path) -> Any:
    """What a file of `torch.save` holds, if that is tensors, NumPy arrays, numbers, text, and lists and dicts of them.

    Raises CheckpointError: PyTorch is not installed, the file holds anything else, or it is damaged.
    """
    torch = _torch(path)
    try:
        with torch.serialization.safe_globals(_numpy_makers()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|load unsupported GLOBAL ([\w.]+)", str(error))
        what = f"it refers to {found[1] or found[2]}" if found else "it holds more than tensors"
        raise CheckpointError(
            f"{path}: refused: {what}, and loading that could run code; have its tensors saved alone, or as safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: truncated, or not a file of torch.save: {reason}") from None


def to_numpy(value: Any) -> np.ndarray | None:
    """The numbers of a tensor or array, bfloat16 kept; None if `value` is neither."""
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "biuf" else None
    if not hasattr(value, "detach"):
        return None
    import torch

    tensor = value.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(BFLOAT16)
    return tensor.numpy()


def save_pickle(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `{"model": tensors}`, as detectron2 does."""
    torch = _torch(path)

    def tensor(array: np.ndarray) -> Any:
        if array.dtype == BFLOAT16:
            return torch.from_numpy(contiguous(array).view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(contiguous(array))

    torch.save({"model": {name: tensor(array) for name, array in tensors.items()}}, path)
