"""A file of weights, whatever its format, as the tensors that it stands for."""

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
"""What GGUF files of SD3's transformer and of T5 call themselves, where they call themselves anything."""
UNNAMED = (None, "pig", "cow")
"""What converters write that know no architectures: names of tensors decide."""


def read_weights(path: Path) -> dict[str, StoredTensor]:
    """Every weight of a file by its name. Raises CheckpointError naming the file and what it is or has wrong.

    Its first bytes say what it is; its suffix only what a damaged one was meant to be.
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
    """The positional table [1, positions, width], whose first dimension some writers drop, as ggml does with ones."""
    return replace(table, shape=(1, *table.shape)) if len(table.shape) == 2 else table


READERS: dict[Container | None, Callable[[Path], dict[str, StoredTensor]]] = {
    "safetensors": _safetensors,
    "gguf": _gguf,
}
