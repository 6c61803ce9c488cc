"""Checksums of arrays' contents: the same however an array is split over devices, and wherever it lies."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped, UInt32

WORDS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint32"}
"""Bytes of a number to what its bits are read as."""


def checksums(tree: Any) -> dict[str, str]:
    """Of every array of a tree, by its name, as `names` has them: 8 hexadecimal digits.

    Where an array's parts lie with several processes, all of these must ask for it together. Devices add up words of
    their own parts in one program that has no collectives: of those that many small programs begin, some devices may
    wait in one and some in the next. Processes exchange one number for each array.
    """
    arrays, meshes = named(tree), dict[Any, list[str]]()
    sums = dict.fromkeys(arrays, 0)
    for name, array in arrays.items():
        if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
            meshes.setdefault(array.sharding.mesh, []).append(name)
        else:
            sums[name] = int(_sum(array))
    for mesh, names in meshes.items():
        found = _sums_over_devices(mesh, [arrays[name] for name in names])
        sums |= dict(zip(names, found.tolist(), strict=True))
    return {name: f"{value:08x}" for name, value in sums.items()}


def named(tree: Any) -> dict[str, Any]:
    """Leaves by their names: keys, attributes and places on the way to them, with slashes between."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _sum(array: Any) -> UInt32[Array, ""]:
    if isinstance(array, jax.Array):
        return _jitted_sum(array)
    # Numbers of 64 bits would be made narrower on their way into JAX.
    whole = np.ascontiguousarray(array)
    words = whole.view(WORDS[whole.itemsize])
    return _jitted_sum(jnp.asarray(words.reshape(*whole.shape, 2) if whole.itemsize == 8 else words))


def _sums_over_devices(mesh: Mesh, arrays: Sequence[jax.Array]) -> UInt32[np.ndarray, " arrays"]:
    """Sums of arrays that a mesh holds: each part counts once, however many devices have it."""
    specs = tuple(cast(NamedSharding, array.sharding).spec for array in arrays)
    of_devices = sums_of_parts(mesh, specs)(*arrays)
    first = [{part.device for part in array.addressable_shards if part.replica_id == 0} for array in arrays]
    sums = np.zeros(len(arrays), np.uint32)
    for part in of_devices.addressable_shards:
        sums += np.asarray(part.data)[0] * np.array([part.device in devices for devices in first], np.uint32)
    if mesh.is_multi_process:
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    return sums


@functools.lru_cache
def sums_of_parts(mesh: Mesh, specs: tuple[P, ...]) -> jax.stages.Wrapped:
    """The program of a mesh: arrays, split so, to one sum for each device and array, [devices, arrays].

    Sums of integers have no order: with places of the whole, those of an array's parts add up to the whole's.
    """

    def part(*parts: Array) -> UInt32[Array, "1 arrays"]:
        sums = [_sum_of_words(part, _ways(mesh, spec, part.ndim)) for part, spec in zip(parts, specs, strict=True)]
        return jnp.stack(sums)[None]

    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P(mesh.axis_names), check_vma=False))


def _ways(mesh: Mesh, spec: P, axes: int) -> list[tuple[int, Any]]:
    """For each axis of an array in how many parts it is, and which of them this device has."""
    split = [() if name is None else name for name in [*spec, *[None] * (axes - len(spec))]]
    names = [(name,) if isinstance(name, str) else tuple(name) for name in split]
    return [(math.prod(mesh.shape[name] for name in of), lax.axis_index(of) if of else 0) for of in names]


def _sum_of_words(array: Shaped[Array, "*shape"], ways: Sequence[tuple[int, Any]] | None = None) -> UInt32[Array, ""]:
    """Of hashes of each word and its place, modulo 2^32: a word that is another, or elsewhere, has another hash.

    A hash is a bijection of the word: one wrong word is always found, more of them but for one time in 2^32. A sum of
    integers has no order, so each device can begin with its part.

    Args:
      ways: where `array` is a part, of the whole's axes how many parts each has, and which of them this is.
    """
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    words = lax.bitcast_convert_type(array, WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)  # of the whole, row by row
    ways = [*(ways or []), *[(1, 0)] * words.ndim]
    for axis, (size, (parts, which)) in enumerate(zip(words.shape, ways, strict=False)):
        start = jnp.uint32(which) * jnp.uint32(size)
        place = place * jnp.uint32(size * parts % 2**32) + lax.broadcasted_iota(jnp.uint32, words.shape, axis) + start
    return jnp.sum(_mixed(words ^ _mixed(place)), dtype=jnp.uint32)


_jitted_sum = jax.jit(_sum_of_words)


def _mixed(word: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Every bit of the result depends on all bits (C. Wellons, Prospecting for Hash Functions, 2018: lowbias32)."""
    word = (word ^ word >> 16) * jnp.uint32(0x7FEB352D)
    word = (word ^ word >> 15) * jnp.uint32(0x846CA68B)
    return word ^ word >> 16
