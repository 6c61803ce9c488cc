"""Checksums of the contents of arrays. They do not depend on how, and over which devices, an array is split."""

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
"""The unsigned dtype that a number's bits are read as, by the number's size in bytes."""


def checksums(tree: Any) -> dict[str, str]:
    """Returns the checksum of every array of a tree, 8 hexadecimal digits, by the names of `named`.

    If the parts of an array are in several processes, all of them must make this call together. Each device sums its
    own parts, in programs without collectives: otherwise some devices could wait in one array's program and others in
    the next. Arrays that are alike share a program. The processes then exchange one number for each array.
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
    """Returns the leaves of a tree by name. A name joins the keys, attributes and indices of the path by slashes."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _sum(array: Any) -> UInt32[Array, ""]:
    if isinstance(array, jax.Array):
        return _jitted_sum(array)
    # JAX would convert 64-bit numbers to 32 bits, so these go in as pairs of 32-bit words.
    whole = np.ascontiguousarray(array)
    words = whole.view(WORDS[whole.itemsize])
    return _jitted_sum(jnp.asarray(words.reshape(*whole.shape, 2) if whole.itemsize == 8 else words))


def _sums_over_devices(mesh: Mesh, arrays: Sequence[jax.Array]) -> UInt32[np.ndarray, " arrays"]:
    """Returns the sums of arrays on a mesh. A part counts once, however many devices hold it."""
    of_devices = [sum_of_parts(mesh, cast(NamedSharding, array.sharding).spec)(array) for array in arrays]
    sums = np.zeros(len(arrays), np.uint32)
    for place, (array, found) in enumerate(zip(arrays, of_devices, strict=True)):
        first = {part.device for part in array.addressable_shards if part.replica_id == 0}
        sums[place] = sum(part.data.item() for part in found.addressable_shards if part.device in first) % 2**32
    if mesh.is_multi_process:
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    return sums


@functools.lru_cache
def sum_of_parts(mesh: Mesh, spec: P) -> jax.stages.Wrapped:
    """Returns a jitted function that sums an array, split by `spec`, on each device: [devices].

    Hashes use each word's place in the whole array, and integer sums do not depend on the order. So the sums of an
    array's parts add up to the sum of the whole.
    """

    def part(array: Array) -> UInt32[Array, " 1"]:
        return _sum_of_words(array, _ways(mesh, spec, array.ndim))[None]

    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=P(mesh.axis_names), check_vma=False))


def _ways(mesh: Mesh, spec: P, axes: int) -> list[tuple[int, Any]]:
    """Returns, for each axis of an array, the number of parts and the index of this device's part."""
    split = [() if name is None else name for name in [*spec, *[None] * (axes - len(spec))]]
    names = [(name,) if isinstance(name, str) else tuple(name) for name in split]
    return [(math.prod(mesh.shape[name] for name in of), lax.axis_index(of) if of else 0) for of in names]


def _sum_of_words(array: Shaped[Array, "*shape"], ways: Sequence[tuple[int, Any]] | None = None) -> UInt32[Array, ""]:
    """Returns the sum of the hashes of all words, modulo 2^32. A hash depends on the word and on its place.

    At a given place the hash is a bijection of the word, so one wrong word is always found. Several wrong words are
    missed about once in 2^32 times. An integer sum does not depend on the order, so each device can sum its own part.

    Args:
      ways: if `array` is a part of a larger one, for each axis of the whole the number of parts and this part's index.
    """
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    words = lax.bitcast_convert_type(array, WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)  # place in the whole array, counted along rows
    ways = [*(ways or []), *[(1, 0)] * words.ndim]
    for axis, (size, (parts, which)) in enumerate(zip(words.shape, ways, strict=False)):
        start = jnp.uint32(which) * jnp.uint32(size)
        place = place * jnp.uint32(size * parts % 2**32) + lax.broadcasted_iota(jnp.uint32, words.shape, axis) + start
    return jnp.sum(_mixed(words ^ _mixed(place)), dtype=jnp.uint32)


_jitted_sum = jax.jit(_sum_of_words)


def _mixed(word: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Mixes a word, so that every bit of the result depends on all of its bits.

    The function is lowbias32 (C. Wellons, Prospecting for Hash Functions, 2018).
    """
    word = (word ^ word >> 16) * jnp.uint32(0x7FEB352D)
    word = (word ^ word >> 15) * jnp.uint32(0x846CA68B)
    return word ^ word >> 16
