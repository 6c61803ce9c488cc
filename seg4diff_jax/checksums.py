"""Checksums of arrays' contents: the same however an array is split over devices, and wherever it lies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped, UInt32

WORDS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint32"}
"""Bytes of a number to what its bits are read as."""


def checksums(tree: Any) -> dict[str, str]:
    """Of every array of a tree, by its name, as `names` has them: 8 hexadecimal digits.

    Where an array's parts lie with several processes, all of these must ask for it together. Devices add up words of
    their own parts, and nothing but one number for each array leaves them.
    """
    return {name: f"{value:08x}" for name, value in jax.device_get(jax.tree.map(_sum, named(tree))).items()}


def named(tree: Any) -> dict[str, Any]:
    """Leaves by their names: keys, attributes and places on the way to them, with slashes between."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _sum(array: Any) -> UInt32[Array, ""]:
    if isinstance(array, jax.Array):
        return _sum_of_words(array)
    # Numbers of 64 bits would be made narrower on their way into JAX.
    whole = np.ascontiguousarray(array)
    words = whole.view(WORDS[whole.itemsize])
    return _sum_of_words(jnp.asarray(words.reshape(*whole.shape, 2) if whole.itemsize == 8 else words))


@jax.jit
def _sum_of_words(array: Shaped[Array, "*shape"]) -> UInt32[Array, ""]:
    """Of hashes of each word and its place, modulo 2^32: a word that is another, or elsewhere, has another hash.

    A hash is a bijection of the word: one wrong word is always found, more of them but for one time in 2^32. A sum of
    integers has no order, so each device can begin with its part.
    """
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    words = lax.bitcast_convert_type(array, WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):  # without a flat copy, which could not stay split
        place = place * jnp.uint32(size % 2**32) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mixed(words ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(word: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Every bit of the result depends on all bits (C. Wellons, Prospecting for Hash Functions, 2018: lowbias32)."""
    word = (word ^ word >> 16) * jnp.uint32(0x7FEB352D)
    word = (word ^ word >> 15) * jnp.uint32(0x846CA68B)
    return word ^ word >> 16
