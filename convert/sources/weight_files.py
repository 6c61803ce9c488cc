"""Reads a weight file of any format, and returns its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.sources.container import HEAD, NO_SAFETENSORS, SUFFIXES, Container, container_of
from seg4diff_jax.convert.sources.gguf import GGUFTensor, read_gguf
from seg4diff_jax.convert.sources.safetensors_stream import read_header
from seg4diff_jax.convert.sources.scaled_fp8 import with_scales
from seg4diff_jax.convert.sources.stored_tensor import StoredTensor

ARCHITECTURES = ("sd3", "t5", "t5encoder")
"""Architectures that GGUF files of SD3's transformer and of T5 name, if they name one."""
UNNAMED = (None, "pig", "cow")
"""Names that converters write when they know no architecture. Then the tensors' names show what the file is."""


def read_weights(path: Path) -> dict[str, StoredTensor]:
    """Returns every weight of a file by name. Raises CheckpointError, which names the file and what it is or has wrong.

    The first bytes show the format. The suffix counts only for a damaged file.
    """
    try:
        with path.open("rb") as file:
            container = container_of(file.read(HEAD))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    container = container or SUFFIXES.get(path.suffix.lower())
    if container not in READERS:
        what = NO_SAFETENSORS.get(container, "neither safetensors nor GGUF: fetch the weights in one of these forms")
        raise CheckpointError(f"{path}: {what}")
    return READERS[container](path)


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    return with_scales(read_header(path), str(path))


def _gguf(path: Path) -> dict[str, StoredTensor]:
    architecture, tensors = read_gguf(path)
    if architecture not in (*ARCHITECTURES, *UNNAMED):
        raise CheckpointError(
            f"{path}: a GGUF file of the architecture {architecture!r}; expected {' or '.join(ARCHITECTURES)}"
        )
    return {name: _with_batch(tensor) if name.endswith("pos_embed") else tensor for name, tensor in tensors.items()}


def _with_batch(table: GGUFTensor) -> GGUFTensor:
    """Returns the positional table as [1, positions, width]. Some writers drop the 1 in front, as ggml does."""
    return replace(table, shape=(1, *table.shape)) if len(table.shape) == 2 else table


READERS: dict[Container | None, Callable[[Path], dict[str, StoredTensor]]] = {
    "safetensors": _safetensors,
    "gguf": _gguf,
}
