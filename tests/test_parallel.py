"""How parameters are split over a mesh: every large one over both model axes, at the published sizes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seg4diff_jax.convert.assemble import abstract
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.sd3.model import MMDiT, MMDiTConfig
from seg4diff_jax.models.t5 import T5Config, T5Encoder
from seg4diff_jax.models.vae import VAE, VAEConfig
from seg4diff_jax.parallel import AXES, batch_share, make_mesh, parameter_shardings

Shape = tuple[int, ...]
RMS = {"qk_norm": "rms_norm"}
TRANSFORMERS = {
    "sd3-medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
    "sd3.5-medium": RMS
    | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
    | {"dual_attention_layers": list(range(13))},
    "sd3.5-large": RMS | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432},
}
AUTOENCODER = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}
CLIPS = {
    "clip-l": CLIP
    | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"projection_dim": 768, "hidden_act": "quick_gelu"},
    "clip-g": CLIP
    | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    | {"projection_dim": 1280, "hidden_act": "gelu"},
}
XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
MODELS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    **{
        name: lambda rngs, config=config: MMDiT(MMDiTConfig.from_json({"pos_embed_max_size": 192} | config), rngs=rngs)
        for name, config in TRANSFORMERS.items()
    },
    **{
        name: lambda rngs, config=config: CLIPText(CLIPTextConfig.from_json(config), rngs=rngs)
        for name, config in CLIPS.items()
    },
    "vae": lambda rngs: VAE(VAEConfig.from_json(AUTOENCODER), rngs=rngs),
    "t5-xxl": lambda rngs: T5Encoder(T5Config.from_json(XXL), rngs=rngs),
}
LARGE = 1_000_000


def mesh_of(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), AXES)


@functools.cache
def shapes_of(model: str) -> dict[str, Shape]:
    """Every parameter of a published model, by the path that it has in memory."""
    flat = nnx.to_flat_state(nnx.state(abstract(MODELS[model])))
    return {".".join(map(str, path)): variable.get_value().shape for path, variable in flat}


def axes_of(sharding: NamedSharding) -> set[Any]:
    return set(sharding.spec) - {None}


@pytest.mark.parametrize("model", MODELS)
def test_every_large_parameter_is_split_over_both_model_axes_but_for_embeddings_and_convolutions(model):
    place = parameter_shardings(mesh_of(2, 4, 2))
    for name, shape in shapes_of(model).items():
        if math.prod(shape) > LARGE:
            one_axis = name.endswith(".embedding") or (model == "vae" and len(shape) == 4)
            assert axes_of(place(name, shape)) == ({"fsdp"} if one_axis else {"fsdp", "tensor"}), name


@pytest.mark.parametrize(
    ("model", "share"),
    [(model, 1.01 / 8) for model in TRANSFORMERS]
    # Embeddings and convolutions are split over four of the eight.
    + [("t5-xxl", 1.03 / 8), ("clip-g", 1.1 / 8), ("clip-l", 1.32 / 8), ("vae", 1.1 / 4)],
)
def test_a_device_of_eight_holds_little_more_than_an_eighth(model, share):
    place, shapes = parameter_shardings(mesh_of(2, 4, 2)), shapes_of(model)
    held = sum(math.prod(place(name, shape).shard_shape(shape)) for name, shape in shapes.items())
    assert held < share * sum(map(math.prod, shapes.values()))


UP, DOWN = "stacks.0.image.mlp.up.kernel", "stacks.0.image.mlp.down.kernel"


@pytest.mark.parametrize(
    ("mesh", "model", "path", "spec"),
    [
        ((1, 4, 2), "sd3-medium", UP, P(None, "fsdp", "tensor")),
        ((1, 5, 2), "sd3-medium", UP, P(None, None, "tensor")),
        ((1, 4, 7), "sd3-medium", UP, P(None, "fsdp", None)),
        ((1, 5, 7), "sd3-medium", DOWN, P(None, None, None)),
        ((1, 4, 2), "sd3-medium", DOWN, P(None, "tensor", "fsdp")),
        ((1, 4, 2), "sd3-medium", "stacks.0.image.attention.q.bias", P(None, "tensor")),
        ((1, 4, 2), "sd3.5-large", "stacks.0.image.attention.q_norm.scale", P()),
        ((1, 4, 2), "sd3.5-medium", "stacks.0.image.dual_attention.out.kernel", P(None, "tensor", "fsdp")),
        ((1, 4, 2), "vae", "decoder.middle.before.conv1.kernel", P(None, None, None, "fsdp")),
    ],
)
def test_an_axis_that_does_not_divide_is_not_split(mesh, model, path, spec):
    assert parameter_shardings(mesh_of(*mesh))(path, shapes_of(model)[path]).spec == spec


@pytest.mark.parametrize("layer", ["attention.q", "attention.v", "attention.out", "mlp.up", "mlp.down"])
def test_an_adapter_is_split_as_the_kernel_beside_it(layer):
    place, path = parameter_shardings(mesh_of(1, 4, 2)), f"transformer.stacks.0.image.{layer}."
    _, into, out = place(path + "kernel", (24, 1536, 1536)).spec
    assert place(path + "lora_a", (24, 1536, 16)).spec == P(None, into, None)
    assert place(path + "lora_b", (24, 16, 1536)).spec == P(None, None, out)


def test_a_mesh_takes_all_devices_unless_told_otherwise():
    for mesh in (make_mesh(), make_mesh(data=jax.device_count())):
        assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


@pytest.fixture
def of_eight(monkeypatch):
    """`make_mesh` as on a host with eight devices, up to what JAX would make: the sizes of the axes."""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "make_mesh", lambda sizes, names, axis_types, devices: sizes)
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


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        ((8, 1, 1), [(0, 2), (1, 2)]),
        ((2, 2, 2), [(0, 2), (1, 2)]),
        ((1, 2, 4), [(0, 2), (1, 2)]),
        ((1, 1, 8), [(0, 1), (0, 1)]),  # all devices see the whole batch, so both processes read all of it
    ],
)
def test_processes_that_hold_the_same_rows_of_a_batch_have_the_same_share(sizes, shares):
    processes = np.repeat(np.arange(2), 4).reshape(sizes)
    assert [batch_share(processes, process) for process in range(2)] == shares


def test_four_processes_in_pairs_share_a_batch_in_halves():
    processes = np.repeat(np.arange(4), 2).reshape(2, 1, 4)
    assert [batch_share(processes, process) for process in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("devices", [[0, 1, 1, 0], [0, 0, 0, 1]])
def test_shares_that_are_no_neighbours_or_not_equal_are_refused(devices):
    with pytest.raises(ValueError, match="expected neighbours, as many for each"):
        batch_share(np.array(devices).reshape(4, 1, 1), 0)
