"""Reads and writes the adapters and the mask head that MAGNET trains.

RUN/export/adapters.safetensors    in our format: `s4d.load(..., lora=RUN/export)`, `seg4diff convert lora`
RUN/export/mask_head.safetensors   if the run has a mask head; only training needs this file
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from seg4diff_jax.models.lora import LoRAConfig, add_lora, lora_state, set_lora_state
from seg4diff_jax.models.mask_head import MaskHead
from seg4diff_jax.models.sd3.model import MMDiT

HEAD_FILE, EXPORT = "mask_head.safetensors", "export"
PREFIX = "attn_mlp.attn_score_layer."
"""Prefix of the head's tensor names in the release's checkpoints. Layer numbers there count the ReLUs too."""


def begin(
    transformer: MMDiT, config: LoRAConfig, start: str | None, *, with_head: bool, seed: int
) -> tuple[MMDiT, MaskHead | None]:
    """Adds adapters to the model and makes the mask head; both are fresh, or read from files.

    Args:
      start: file or directory of adapters, in any format that `seg4diff convert lora` reads; None: fresh adapters.
        Layers without adapters in the file get fresh ones, as in PEFT.
      with_head: whether to make a head; the head is fresh if the files hold none.

    Raises:
      CheckpointError: the file cannot be read, or its adapters do not fit the model.
      ValueError: the file's configuration differs from `config`, or the file has a head and `with_head` is False.
    """
    from seg4diff_jax.convert.errors import CheckpointError
    from seg4diff_jax.convert.lora.adapters import read_lora

    rngs = nnx.Rngs(seed)
    head = MaskHead(rngs=rngs) if with_head else None
    if start is None:
        return add_lora(transformer, config, rngs), head
    read = read_lora(start)
    _check_equal(start, config, read.config, transformer.depth)
    tensors = {**read.others, **_head_beside(Path(start).expanduser())}
    if unknown := [name for name in tensors if not name.startswith(PREFIX)]:
        raise ValueError(f"{start}: tensors that are neither adapters nor a mask head: {', '.join(unknown)}")
    if tensors and head is None:
        raise ValueError(
            f"{start} has a mask head and objective.mask_head is null: give objective.mask_head conv to train it on, "
            f"or leave it out with `seg4diff convert lora {start} DST --to native --adapters-only`"
        )
    if tensors and head is not None:
        fill_head(head, tensors, start)
    try:
        adapted = add_lora(transformer, read.config, rngs)
        return set_lora_state(adapted, {**lora_state(adapted), **read.adapters}), head
    except ValueError as error:
        raise CheckpointError(f"{start}: {error}") from None


def write(directory: Path, config: LoRAConfig, transformer: MMDiT, head: MaskHead | None) -> None:
    """Writes a run's export. The directory appears only when all its files are complete."""
    from safetensors.numpy import save_file

    from seg4diff_jax.convert.lora.adapters import save_lora
    from seg4diff_jax.convert.lora.files import NATIVE_FILE
    from seg4diff_jax.convert.staging import staged_directory

    with staged_directory(directory) as work:
        save_lora(work / NATIVE_FILE, config, lora_state(transformer))
        if head is not None:
            save_file(head_tensors(head), work / HEAD_FILE)


def head_tensors(head: MaskHead) -> dict[str, np.ndarray]:
    """Returns the head's tensors in PyTorch's layout, under the release's names."""
    tensors = {}
    for number, layer in enumerate(head.layers):
        name = f"{PREFIX}{2 * number}"
        tensors[f"{name}.weight"] = np.ascontiguousarray(np.asarray(layer.kernel.get_value()).transpose(3, 2, 0, 1))
        assert layer.bias is not None
        tensors[f"{name}.bias"] = np.asarray(layer.bias.get_value())
    return tensors


def fill_head(head: MaskHead, tensors: Mapping[str, np.ndarray], where: object) -> None:
    """Fills the head with tensors as `head_tensors` returns them.

    Raises:
      ValueError: tensors are missing, surplus, of another shape, or not floating-point.
    """
    expected = {name: array.shape for name, array in head_tensors(head).items()}
    found = {name: np.shape(array) for name, array in tensors.items()}
    if expected != found:
        raise ValueError(f"{where}: its mask head has tensors {found}; expected {expected}")
    if wrong := [f"{name} ({array.dtype})" for name, array in tensors.items() if not _is_floating(array)]:
        raise ValueError(f"{where}: its mask head has {', '.join(wrong)}; expected floating-point numbers")
    for number, layer in enumerate(head.layers):
        weight, bias = (tensors[f"{PREFIX}{2 * number}.{kind}"] for kind in ("weight", "bias"))
        layer.kernel.set_value(jnp.asarray(np.asarray(weight, np.float32).transpose(2, 3, 1, 0)))
        assert layer.bias is not None
        layer.bias.set_value(jnp.asarray(np.asarray(bias, np.float32)))


def _is_floating(array: np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _head_beside(place: Path) -> dict[str, np.ndarray]:
    """Returns the head's tensors from the file beside the adapters; empty if there is no such file.

    Raises:
      CheckpointError: the file exists and cannot be read.
    """
    from seg4diff_jax.convert.sources.safetensors_stream import read_header, read_tensor

    folders = (place, place / EXPORT) if place.is_dir() else (place.parent,)
    found = [folder / HEAD_FILE for folder in folders if os.path.lexists(folder / HEAD_FILE)]
    return {name: read_tensor(info) for name, info in read_header(found[0]).items()} if found else {}


def _check_equal(start: str, asked: LoRAConfig, found: LoRAConfig, depth: int) -> None:
    every = tuple(range(depth))
    pairs = {
        "rank": (asked.rank, found.rank),
        "alpha": (asked.alpha, found.alpha),
        "targets": (sorted(asked.targets), sorted(found.targets)),
        "blocks": (asked.blocks or every, found.blocks or every),
    }
    different = [f"lora.{name} is {mine}, theirs {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]
    if different:
        raise ValueError(f"{start} holds other adapters than are asked for: {'; '.join(different)}")
