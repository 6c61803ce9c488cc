"""Checksums of arrays that two processes hold together, and a checkpoint of theirs that goes on on another mesh.

python -m tests.reference.split_checksums DIR
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from seg4diff_jax.checksums import checksums, sum_of_parts
from seg4diff_jax.parallel import make_mesh
from seg4diff_jax.processes import join_processes
from seg4diff_jax.training.checkpoints import Checkpoints
from seg4diff_jax.training.state import TrainState

DTYPES = ("float32", "bfloat16")
SPLIT = {"data": P("data", None, None), "all": P("data", "fsdp", "tensor"), "two": P(None, ("data", "fsdp"), None)}


def values(dtype: str) -> np.ndarray:
    return np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 6)) * 50).astype(dtype))


def placed(array: np.ndarray, place: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


if __name__ == "__main__":
    join_processes()
    mesh, other = make_mesh(2, 2, 2), make_mesh(4, 1, 2)
    places = {name: NamedSharding(mesh, spec) for name, spec in SPLIT.items()} | {"whole": NamedSharding(other, P())}
    found = {
        name: checksums({dtype: placed(values(dtype), place) for dtype in DTYPES}) for name, place in places.items()
    }

    split = {name: placed(values("float32"), place) for name, place in places.items() if place.mesh == mesh}
    programs = [sum_of_parts(mesh, SPLIT[name]).lower(array).compile().as_text() for name, array in split.items()]
    collectives = re.findall(r"\b(?:all-|reduce-scatter|collective-)\S*", "".join(map(str, programs)))

    def state(place: NamedSharding) -> TrainState:
        whole = NamedSharding(place.mesh, P())
        arrays = {dtype: placed(values(dtype), place) for dtype in DTYPES}
        return TrainState(placed(np.array(3, np.int32), whole), arrays, (), None, placed(np.zeros(2, np.uint32), whole))

    with Checkpoints(Path(sys.argv[1]), keep=1) as checkpoints:
        checkpoints.save(1, state(places["all"]), 3, {})
        checkpoints.wait()
        with jax.set_mesh(other):
            target = state(NamedSharding(other, P(None, "data", "tensor")))
            read = checkpoints.restore(1, target, jax.tree.map(lambda array: array.sharding, target))
    print(json.dumps({"sums": found, "collectives": collectives, "checked": read.checked, "batches": read.batches}))
