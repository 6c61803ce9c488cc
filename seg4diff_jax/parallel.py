"""The device mesh, and the table that says which axis of a parameter is split over which axis of the mesh."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
"""Batches are split over the axes `data` and `fsdp` together."""

LAYERS = r"(.*\.)?(stacks\.\d+|blocks)\..*\b"
RULES: tuple[tuple[str, P], ...] = (
    # Stacked layers: [layer, in, out]. Heads and hidden units are split over `tensor`, the other side over `fsdp`.
    (LAYERS + r"(q|k|v|up|gate|modulation)\.kernel", P(None, "fsdp", "tensor")),
    (LAYERS + r"(out|down)\.kernel", P(None, "tensor", "fsdp")),
    (LAYERS + r"(q|k|v|up|gate|modulation)\.bias", P(None, "tensor")),
    # Adapters are split as their kernels are; the rank axis is not split.
    (LAYERS + r"(out|down)\.lora_a", P(None, "tensor", None)),
    (LAYERS + r"(out|down)\.lora_b", P(None, None, "fsdp")),
    (r".*\.lora_a", P(None, "fsdp", None)),
    (r".*\.lora_b", P(None, None, "tensor")),
    (r".*\.embedding", P("fsdp", None)),
    (r"(.*\.)?(time_embed|pooled_embed)\.(up|down)\.kernel", P("fsdp", "tensor")),
    (r"(.*\.)?(context_embed|norm_out|projection)\.kernel", P("fsdp", "tensor")),
    (r"(.*\.)?pos_embed", P("fsdp", None, "tensor")),
    # Convolutions: [height, width, in, out].
    (r"(.*\.)?(encoder|decoder)\..*conv\w*\.kernel", P(None, None, None, "fsdp")),
)
"""Patterns of parameter paths, and how such parameters are split. The first match counts. Every device holds the whole
of a parameter that matches none."""


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh.

    Attributes:
      data: devices that share a batch and hold the same weights; null: all that the other axes leave.
      fsdp: devices that share a batch and split the weights.
      tensor: devices that split heads and hidden units of each picture.
    """

    data: int | None = None
    fsdp: int = 1
    tensor: int = 1


def make_mesh(data: int | None = None, fsdp: int = 1, tensor: int = 1, *, among: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh of data x fsdp x tensor devices.

    Args:
      data: default: the number of devices divided by fsdp x tensor.
      among: the devices, all of which are used. Default: all that JAX has, with those of other processes.

    Raises:
      ValueError: an axis is no positive whole number, or data x fsdp x tensor is not the number of devices.
    """
    devices = jax.device_count() if among is None else len(among)
    for name, size in (("data", data), ("fsdp", fsdp), ("tensor", tensor)):
        if not (size is None and name == "data") and (type(size) is not int or size < 1):
            raise ValueError(f"{name} is {size!r}; expected a whole number of devices, at least 1")
    if data is None and devices % (fsdp * tensor):
        raise ValueError(
            f"fsdp x tensor is {fsdp} x {tensor} = {fsdp * tensor}, which does not divide the {devices} devices that "
            "JAX has"
        )
    data = devices // (fsdp * tensor) if data is None else data
    if data * fsdp * tensor != devices:
        raise ValueError(
            f"data x fsdp x tensor is {data} x {fsdp} x {tensor} = {data * fsdp * tensor}, and JAX has {devices} "
            f"devices: the product must be that number{_remedy(devices, fsdp * tensor)}"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=among)


def _remedy(devices: int, model: int) -> str:
    return "" if devices % model else f"; leave data out to have it {devices // model}"


def batch_share(processes: Int[np.ndarray, "data fsdp tensor"], process: int) -> tuple[int, int]:
    """Returns the index of a process's share of every batch, and the number of shares.

    Processes whose devices differ along `tensor` alone have the same share: they must read the same items.

    Args:
      processes: the number of each device's process, in the shape of the mesh.

    Raises:
      ValueError: the processes cannot share a batch evenly, each with consecutive rows.
    """
    parts = processes.reshape(-1, processes.shape[2])  # parts of a batch, in their order
    held = {int(number): tuple(np.flatnonzero((parts == number).any(axis=1))) for number in np.unique(processes)}
    shares = sorted(set(held.values()))
    if [*itertools.chain(*shares)] != [*range(len(parts))] or len({len(share) for share in shares}) != 1:
        sizes, parts_of = " x ".join(map(str, processes.shape)), [[*map(int, share)] for share in held.values()]
        raise ValueError(
            f"data x fsdp x tensor is {sizes}, and the {len(held)} processes have parts {parts_of} of a batch: "
            "expected neighbours, as many for each; make data x fsdp a multiple of the processes"
        )
    return shares.index(held[process]), len(shares)


def on_host(array: Any) -> np.ndarray:
    """Returns a whole array in this process's memory, wherever its parts are.

    If other processes hold parts of the array, all of them must make this call together.
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def split_batch(array: Shaped[Array, "*shape"], axis: int = 0) -> Shaped[Array, "*shape"]:
    """Constrains an array's batch axis to be split over `data` and `fsdp`, and its other axes to be whole.

    Models call this on the inputs and outputs of their layers. Otherwise XLA splits some of them over `tensor`, which
    costs collectives and can give wrong numbers. XLA (jaxlib 0.10.2 and 0.12.0) has been seen to compute x W wrong,
    with W split over `tensor` and `fsdp`, when the result was to be split over `tensor`, these two axes had equally
    many devices, and `data` had several too. In a backward pass, the input gradients of layers are such products.

    The array is returned without a constraint outside jit, if the mesh in context lacks these axes or does not leave
    them to the compiler, and if the batch does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not isinstance(array, Tracer) or not {"data", "fsdp"} <= automatic:
        return array
    if array.shape[axis] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return array
    return jax.lax.with_sharding_constraint(array, P(*[None] * axis, *BATCH))


def spread(arrays: Any, mesh: Mesh | None) -> Any:
    """Puts arrays on the mesh, with leading axes split over `data` and `fsdp` if they divide.

    Without a mesh the arrays are returned unchanged.
    """
    if mesh is None:
        return arrays
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    place = lambda array: NamedSharding(mesh, BATCH if len(array) % devices == 0 else P())
    return jax.tree.map(lambda array: jax.device_put(array, place(array)), arrays)


def parameter_shardings(mesh: Mesh | AbstractMesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Returns a function from a parameter's path and shape to its sharding. Axes that do not divide are not split."""

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next((spec for pattern, spec in RULES if re.fullmatch(pattern, path)), P())
        fits = [axis if axis and shape[i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(spec)]
        return NamedSharding(mesh, P(*fits))

    return sharding


def named_devices(count: int | None = None) -> str:
    """Returns number and kind of the devices, for people. `count` None: all devices of every process."""
    number = jax.device_count() if count is None else count
    return f"{number} x {jax.devices()[0].device_kind}" if number > 1 else jax.devices()[0].device_kind
