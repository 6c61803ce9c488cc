"""Reads PyTorch's pickled files without running code from them, and writes such files.

Without PyTorch a CheckpointError says that it is needed.
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from seg4diff_jax.convert.errors import CheckpointError, reason
from seg4diff_jax.convert.layout import contiguous
from seg4diff_jax.convert.sources.container import HEAD, container_of

SAME_BITS = {
    "bfloat16": ("uint16", np.dtype(ml_dtypes.bfloat16)),
    "float8_e4m3fn": ("uint8", np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": ("uint8", np.dtype(ml_dtypes.float8_e5m2)),
}
"""PyTorch's dtypes that NumPy lacks: for each an integer dtype with the same bits, and the dtype of ml_dtypes."""
PLAIN = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", "U1", "S1")
"""NumPy's dtypes of numbers and text."""
CHUNK = 1 << 20


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: PyTorch's pickled files need PyTorch: pip install torch, or use a safetensors format"
        ) from None
    return torch


def _latin1(text: str, encoding: str) -> bytes:
    """Returns text as bytes, for pickle's second protocol. Only the encoding that this protocol uses is accepted."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode(encoding)


def _numpy_makers() -> list[Any]:
    """Returns the globals that pickled NumPy arrays and scalars refer to. None of them runs code from the file."""
    functions = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since NumPy 2
    makers: list[Any] = [(made, f"{module}.{name}") for module in modules for name, made in functions.items()]
    return [*makers, (_latin1, "_codecs.encode"), np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in PLAIN}]


def is_pickle(path: Path) -> bool:
    """Whether a file is one of torch.save, or a zip, which may be one."""
    with path.open("rb") as file:
        return container_of(file.read(HEAD)) in ("torch", "zip")


def _check_sums(path: Path) -> None:
    """Compares a zip's contents with their CRC-32, which torch.load does not. PyTorch can be told to write none."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries if any(entry.CRC for entry in entries) else ():
            with archive.open(entry) as file:  # raises at the end of an entry whose sum is wrong
                while file.read(CHUNK):
                    pass


def load_pickle(path: Path) -> Any:
    """Returns the content of a file of `torch.save`: tensors, NumPy arrays, numbers, text, and lists and dicts of them.

    Raises CheckpointError if PyTorch is not installed, or if the file is damaged or holds anything else.
    """
    torch = _torch(path)
    try:
        _check_sums(path)
        # An open file: torch.load hands a path that ends in .safetensors to another reader.
        with torch.serialization.safe_globals(_numpy_makers()), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|load unsupported GLOBAL ([\w.]+)", str(error))
        what = f"it refers to {(found[1] or found[2])[:80]}" if found else "it holds more than tensors"
        raise CheckpointError(
            f"{path}: refused: {what}, and loading that could run code; have its tensors saved alone, or as safetensors"
        ) from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise CheckpointError(f"{path}: damaged: {reason(error)}; fetch the file again") from None
    except MemoryError:
        raise
    except Exception as error:  # of any class: PyTorch asserts what it expects, and unpacks what it finds
        raise CheckpointError(f"{path}: truncated, or not a file of torch.save: {reason(error)}") from None


def to_numpy(value: Any) -> np.ndarray | None:
    """Returns a tensor or array as a NumPy array of the same dtype, also of bfloat16 and the like.

    Returns None if `value` is neither, or holds fewer numbers than its shape says, as sparse and repeated tensors do.
    """
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "biuf" else None
    if not hasattr(value, "detach"):
        return None
    import torch

    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return None
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return None
    bits, dtype = SAME_BITS.get(str(tensor.dtype).removeprefix("torch."), (None, None))
    if bits is not None:
        return tensor.contiguous().view(getattr(torch, bits)).numpy().view(dtype)
    return tensor.resolve_conj().resolve_neg().contiguous().numpy()


def save_pickle(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `{"model": tensors}`, as detectron2 does."""
    torch = _torch(path)

    def tensor(array: np.ndarray) -> Any:
        for name, (bits, dtype) in SAME_BITS.items():
            if array.dtype == dtype:
                return torch.from_numpy(contiguous(array).view(bits)).view(getattr(torch, name))
        return torch.from_numpy(contiguous(array))

    torch.save({"model": {name: tensor(array) for name, array in tensors.items()}}, path)
