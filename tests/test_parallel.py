"""How parameters are split over a mesh: every large one over both model axes, at the published sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from convert.assemble import abstract
from seg4diff_jax.models.mmdit import MMDiT, MMDiTConfig
from seg4diff_jax.models.t5 import T5Config, T5Encoder
from seg4diff_jax.parallel import AXES, make_mesh, parameter_shardings

PUBLISHED = {
    "sd3-medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
    "sd3.5-large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    },
}
LARGE = 1_000_000


def mesh_of(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), AXES)


def shardings_of(model: nnx.Module, mesh: AbstractMesh) -> Iterator[tuple[str, tuple[int, ...], NamedSharding]]:
    place = parameter_shardings(mesh)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, shape = ".".join(map(str, path)), variable.get_value().shape
        yield name, shape, place(name, shape)


def axes_of(sharding: NamedSharding) -> set[Any]:
    return set(sharding.spec) - {None}


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_large_parameter_is_split_over_both_model_axes(model):
    config = MMDiTConfig.from_json({"pos_embed_max_size": 192} | PUBLISHED[model])
    transformer = abstract(lambda rngs: MMDiT(config, rngs=rngs))
    held, total = 0, 0
    for name, shape, sharding in shardings_of(transformer, mesh_of(2, 4, 2)):
        if math.prod(shape) > LARGE:
            assert axes_of(sharding) == {"fsdp", "tensor"}, name
        held += math.prod(sharding.shard_shape(shape))
        total += math.prod(shape)
    assert held < 1.01 * total / 8


def test_t5_is_split_too():
    published = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    config = T5Config.from_json(published | {"feed_forward_proj": "gated-gelu"})
    encoder = abstract(lambda rngs: T5Encoder(config, rngs=rngs))
    for name, shape, sharding in shardings_of(encoder, mesh_of(1, 4, 2)):
        if math.prod(shape) > LARGE and "embedding" not in name:
            assert axes_of(sharding) == {"fsdp", "tensor"}, name
        elif math.prod(shape) > LARGE:
            assert axes_of(sharding) == {"fsdp"}, name


@pytest.mark.parametrize(
    ("mesh", "path", "shape", "spec"),
    [
        ((1, 4, 2), "stacks.0.image.mlp.up.kernel", (23, 1536, 6144), P(None, "fsdp", "tensor")),
        ((1, 5, 2), "stacks.0.image.mlp.up.kernel", (23, 1536, 6144), P(None, None, "tensor")),
        ((1, 4, 7), "stacks.0.image.mlp.up.kernel", (23, 1536, 6144), P(None, "fsdp", None)),
        ((1, 5, 7), "stacks.0.image.mlp.down.kernel", (23, 6144, 1536), P(None, None, None)),
        ((1, 4, 2), "stacks.0.image.mlp.down.kernel", (23, 6144, 1536), P(None, "tensor", "fsdp")),
        ((1, 4, 2), "stacks.0.image.attention.q.bias", (23, 1536), P(None, "tensor")),
        ((1, 4, 2), "stacks.0.image.attention.norm_q.scale", (23, 64), P()),
    ],
)
def test_an_axis_that_does_not_divide_is_not_split(mesh, path, shape, spec):
    assert parameter_shardings(mesh_of(*mesh))(path, shape).spec == spec


def test_a_mesh_takes_all_devices_unless_told_otherwise():
    for mesh in (make_mesh(), make_mesh(data=jax.device_count())):
        assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


@pytest.fixture
def of_eight(monkeypatch):
    """`make_mesh` as on a host with eight devices, up to what JAX would make: the sizes of the axes."""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "make_mesh", lambda sizes, names, axis_types: sizes)
    return make_mesh.__wrapped__ if hasattr(make_mesh, "__wrapped__") else make_mesh


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": None, "tensor": 8}, (1, 1, 8)),
        ({"data": 4, "fsdp": 2}, (4, 2, 1)),
    ],
)
def test_data_takes_the_devices_that_the_other_axes_leave(of_eight, given, sizes):
    assert of_eight(**given) == sizes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp": 3}, "fsdp x tensor is 3 x 1 = 3, which does not divide the 8 devices that JAX has"),
        ({"fsdp": 16}, "fsdp x tensor is 16 x 1 = 16, which does not divide the 8 devices"),
        ({"data": 1}, "is 1 x 1 x 1 = 1, and JAX has 8 devices: the product must be that number; leave data out to "),
        ({"data": 2, "fsdp": 2}, "leave data out to have it 4"),
        ({"data": 3, "fsdp": 3}, "is 3 x 3 x 1 = 9, and JAX has 8 devices: the product must be that number$"),
        ({"fsdp": 0}, "fsdp is 0; expected a whole number of devices, at least 1"),
        ({"data": -8, "tensor": -1}, "data is -8; expected a whole number"),
        ({"tensor": True}, "tensor is True; expected a whole number"),
    ],
)
def test_axes_that_do_not_fit_the_devices_are_refused(of_eight, given, message):
    with pytest.raises(ValueError, match=message):
        of_eight(**given)
