"""Checksums of arrays: by a loop over words, whatever the dtype, and however an array is split."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from seg4diff_jax.checksums import checksums
from seg4diff_jax.parallel import make_mesh
from tests.reference import split_checksums
from tests.reference.processes import finish, together
from tests.reference.split_checksums import values

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "uint8", "int8", "bool"]


def by_hand(array: np.ndarray) -> str:
    """One word after the other, in Python's whole numbers."""

    def mixed(word: int) -> int:
        word = (word ^ word >> 16) * 0x7FEB352D % 2**32
        word = (word ^ word >> 15) * 0x846CA68B % 2**32
        return word ^ word >> 16

    size = min(array.itemsize, 4)
    data = np.ascontiguousarray(array).tobytes()
    words = [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]
    return f"{sum(mixed(word ^ mixed(place)) for place, word in enumerate(words)) % 2**32:08x}"


def drawn(dtype: str, *shape: int) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=shape) * 50
    return np.asarray(jnp.asarray(values > 0 if dtype == "bool" else values).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_is_the_sum_of_the_hashes_of_words_and_places(dtype):
    array = drawn(dtype, 3, 4, 5)
    assert checksums({"a": array, "b": jnp.asarray(array)}) == {"a": by_hand(array), "b": by_hand(array)}


def test_numbers_of_64_bits_are_not_made_narrower():
    array = np.array([[1.0, 1.0 + 1e-12], [np.pi, -0.0]])
    assert checksums(array) == {"": by_hand(array)}
    assert checksums(np.int64(2**40 + 1)) == {"": by_hand(np.asarray(2**40 + 1))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_every_flipped_bit_is_found(dtype):
    array = drawn(dtype, 3, 7)
    whole = checksums(array)
    for bit in range(8 * array.nbytes):
        data = bytearray(array.tobytes())
        data[bit // 8] ^= 1 << bit % 8
        assert checksums(np.frombuffer(data, array.dtype).reshape(array.shape)) != whole


def test_the_order_of_numbers_counts_and_their_axes_do_not():
    array = drawn("float32", 6, 4)
    assert checksums(array) != checksums(array[::-1])
    assert checksums(array) == checksums(array.reshape(4, 6))


def test_arrays_of_one_mesh_have_shapes_of_their_own():
    mesh = make_mesh(1, among=jax.devices()[:1])
    arrays = {"a": drawn("float32", 3, 4), "b": drawn("bfloat16", 5), "c": drawn("int32")}
    placed = {name: jax.device_put(array, NamedSharding(mesh, PartitionSpec())) for name, array in arrays.items()}
    assert checksums(placed) == {name: by_hand(array) for name, array in arrays.items()}


def test_names_are_ways_through_the_tree():
    tree = {"a.b": jnp.zeros(1), "c": (jnp.zeros(1), [jnp.zeros(1)])}
    assert [*checksums(tree)] == ["a.b", "c/0", "c/1/0"]


def test_an_array_that_two_processes_hold_has_the_checksum_of_the_whole_and_goes_on_on_another_mesh(tmp_path):
    said = finish(*together("split_checksums", str(tmp_path), devices=4))
    whole = {dtype: by_hand(values(dtype)) for dtype in split_checksums.DTYPES}
    for each in said:
        found = json.loads(each.splitlines()[-1])
        sums = dict.fromkeys([*split_checksums.SPLIT, "whole"], whole)
        assert found == {"sums": sums, "collectives": [], "checked": True, "batches": 3}
