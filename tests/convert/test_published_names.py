"""The tensors of Stability's published transformers, name by name and at their sizes, are consumed whole."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from seg4diff_jax.convert.components import COMPONENTS, abstract_model, expert_block, parse_config
from seg4diff_jax.convert.inferred_configs import infer_config
from seg4diff_jax.convert.names import Shape, assign, parameter_shapes


class Published(NamedTuple):
    blocks: int
    width: int
    table: int
    """Side of the positional table."""
    dual: int = 0
    """The first that many blocks attend twice."""
    norms: bool = True


PUBLISHED = {
    "sd3-medium": Published(24, 1536, 192, norms=False),
    "sd3.5-medium": Published(24, 1536, 384, dual=13),
    "sd3.5-large": Published(38, 2432, 192),
}


def linear(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def attention(name: str, width: int, *, norms: bool, projected: bool = True) -> dict[str, Shape]:
    shapes = linear(f"{name}.qkv", 3 * width, width)
    if norms:
        shapes |= {f"{name}.ln_q.weight": (64,), f"{name}.ln_k.weight": (64,)}
    return shapes | (linear(f"{name}.proj", width, width) if projected else {})


def mlp(name: str, width: int) -> dict[str, Shape]:
    return linear(f"{name}.fc1", 4 * width, width) | linear(f"{name}.fc2", width, 4 * width)


def published_tensors(model: Published) -> dict[str, Shape]:
    """Name and shape of every tensor, without `model.diffusion_model.`"""
    width = model.width
    shapes: dict[str, Shape] = {
        "pos_embed": (1, model.table**2, width),
        "x_embedder.proj.weight": (width, 16, 2, 2),
        "x_embedder.proj.bias": (width,),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        **linear("y_embedder.mlp.0", width, 2048),
        **linear("y_embedder.mlp.2", width, width),
        **linear("context_embedder", width, 4096),
        **linear("final_layer.linear", 64, width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    for block in range(model.blocks):
        x, context = f"joint_blocks.{block}.x_block", f"joint_blocks.{block}.context_block"
        dual, last = block < model.dual, block == model.blocks - 1
        shapes |= linear(f"{x}.adaLN_modulation.1", (9 if dual else 6) * width, width)
        shapes |= attention(f"{x}.attn", width, norms=model.norms) | mlp(f"{x}.mlp", width)
        shapes |= attention(f"{x}.attn2", width, norms=model.norms) if dual else {}
        shapes |= linear(f"{context}.adaLN_modulation.1", (2 if last else 6) * width, width)
        shapes |= attention(f"{context}.attn", width, norms=model.norms, projected=not last)
        shapes |= {} if last else mlp(f"{context}.mlp", width)
    return shapes


@pytest.fixture(params=list(PUBLISHED))
def model(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_published_tensor_fills_a_parameter_and_every_parameter_is_filled(model: str):
    tensors = published_tensors(PUBLISHED[model])
    config = infer_config("transformer", tensors)
    expected = parameter_shapes(abstract_model("transformer", config))
    rules = COMPONENTS["transformer"].rules["stability"](parse_config("transformer", config))
    found = assign(rules, tensors, expected, what=model)
    assert {row.source for row in found} == tensors.keys()
    assert sorted(target for row in found for target in row.targets) == sorted(expected)
    assert expert_block(config) == (None if model == "sd3.5-large" else 9)


def test_diffusers_expects_the_same_names_and_makes_its_own_model_of_them(model: str):
    tensors = published_tensors(PUBLISHED[model])
    checkpoint = {f"model.diffusion_model.{n}": torch.empty(s, device="meta") for n, s in tensors.items()}
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    assert not checkpoint  # it takes out what it uses, and raises KeyError for what it misses
    config = {k: v for k, v in infer_config("transformer", tensors).items() if not k.startswith("_")}
    with torch.device("meta"):
        expected = SD3Transformer2DModel(**config).state_dict()
    assert {name: tensor.shape for name, tensor in theirs.items()} == {n: t.shape for n, t in expected.items()}
