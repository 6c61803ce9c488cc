"""A transformer alone in its file has the heads that it was made with, or is refused where nothing tells them."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.inferred_configs import infer_config
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.models.conditioning import TextConditioning
from tests.reference.random_weights import randomize_
from tests.reference.weight_files import random_tensors, write_plain

WEIGHTS = "diffusion_pytorch_model.safetensors"
INPUTS = tuple(
    np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((1, 16, 8, 8), (1, 5, 48), (1, 24))
)
"""Latents (channels first), context, pooled context."""


def save(folder: Path, *, head: int = 32, norms: bool = False) -> SD3Transformer2DModel:
    """A small transformer as `save_pretrained` leaves it: weights with config.json beside them."""
    model = SD3Transformer2DModel(
        num_layers=2,
        num_attention_heads=128 // head,
        attention_head_dim=head,
        caption_projection_dim=128,
        joint_attention_dim=48,
        pooled_projection_dim=24,
        pos_embed_max_size=12,
        qk_norm="rms_norm" if norms else None,
    )
    randomize_(model, 0)
    model.save_pretrained(folder)
    return model.eval()


def moved(folder: Path, name: str = "alone.safetensors") -> Path:
    """The weights where nothing lies beside them."""
    (folder / "elsewhere").mkdir()
    return (folder / WEIGHTS).rename(folder / "elsewhere" / name)


def assert_same_velocity(source: Path, reference: SD3Transformer2DModel) -> None:
    with torch.no_grad():
        theirs = reference(*map(torch.from_numpy, INPUTS), torch.tensor([400.0])).sample.numpy()
    latents, context, pooled = map(jnp.asarray, INPUTS)
    model = load_component(source, "transformer")
    ours, _ = model(latents.transpose(0, 2, 3, 1), jnp.asarray([400.0]), TextConditioning(context, pooled))
    np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("norms", [True, False])
def test_the_configuration_beside_a_transformer_is_read(tmp_path: Path, norms: bool):
    assert_same_velocity(tmp_path / WEIGHTS, save(tmp_path, norms=norms))


@pytest.mark.parametrize("shards", ["5GB", "100KB"])
def test_the_folder_of_a_transformer_alone_is_read(tmp_path: Path, shards: str):
    reference = save(tmp_path / "transformer")
    reference.save_pretrained(tmp_path / "transformer", max_shard_size=shards)
    assert any((tmp_path / "transformer").glob("*-of-*")) == (shards != "5GB")
    assert_same_velocity(tmp_path / "transformer", reference)


def test_folders_of_a_checkpoint_without_its_index_say_what_to_fetch(tmp_path: Path):
    save(tmp_path / "transformer")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / WEIGHTS).touch()
    said = r"\(its transformer, vae belong to one in diffusers' layout: fetch its model_index\.json too\)"
    with pytest.raises(CheckpointError, match=said):
        open_source(tmp_path)


@pytest.mark.parametrize(("head", "norms"), [(32, True), (64, True), (64, False)])
def test_without_one_the_norms_of_queries_tell_the_size_of_heads_or_it_is_the_published_one(
    tmp_path: Path, head: int, norms: bool
):
    reference = save(tmp_path, head=head, norms=norms)
    assert_same_velocity(moved(tmp_path), reference)


def test_tensors_have_to_be_those_of_the_configuration_beside_them(tmp_path: Path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"pooled_projection_dim": 40}), "utf-8")
    with pytest.raises(CheckpointError, match=r"time_text_embed\.text_embedder\.linear_1\.weight"):
        open_source(tmp_path / WEIGHTS).component("transformer").check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_head_dim": "32"}, r"config\.json: transformer: .*attention_head_dim is '32'"),
        ({"quantization_config": {"quant_method": "gguf"}}, r"config\.json: .* gguf"),
    ],
)
def test_a_configuration_beside_a_transformer_that_cannot_be_read_is_named(tmp_path: Path, change: dict, message: str):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | change), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / WEIGHTS)


def test_another_models_configuration_beside_a_transformer_says_nothing_of_it(tmp_path: Path):
    reference = save(tmp_path, norms=True)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}', "utf-8")
    assert_same_velocity(tmp_path / WEIGHTS, reference)


def test_one_misshapen_norm_is_told_by_itself(tmp_path: Path):
    tensors = random_tensors("transformer", "stability")
    name = "joint_blocks.0.x_block.attn.ln_q.weight"
    file = write_plain(tmp_path / "sd3.safetensors", tensors | {name: np.ones(32, np.float32)})
    with pytest.raises(CheckpointError, match=name) as caught:
        open_source(file).component("transformer").check()
    assert "(1 problems)" in str(caught.value)


SHAPES = {
    "context_embedder.weight": (96, 48),
    "x_embedder.proj.weight": (96, 16, 2, 2),
    "final_layer.linear.weight": (64, 96),
    "y_embedder.mlp.0.weight": (96, 24),
    "pos_embed": (1, 144, 96),
    "joint_blocks.0.x_block.attn.qkv.weight": (288, 96),
}
NORM = "joint_blocks.0.x_block.attn.ln_q.weight"


def test_a_width_that_is_no_whole_number_of_heads_is_refused():
    with pytest.raises(CheckpointError, match=r"^transformer: 96 features .* heads of 64, which all published"):
        infer_config("transformer", SHAPES)
    with pytest.raises(CheckpointError, match=rf"^transformer: 96 features .* heads of 36, as {NORM} says"):
        infer_config("transformer", SHAPES | {NORM: (36,)})
    config = infer_config("transformer", SHAPES | {NORM: (48,)})
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (2, 48)
    clip = {
        "text_model.embeddings.token_embedding.weight": (9, 96),
        "text_model.encoder.layers.0.mlp.fc1.weight": (384, 96),
    }
    with pytest.raises(CheckpointError, match=r"^text_encoder: 96 features .* heads of 64"):
        infer_config("text_encoder", clip)


def test_channels_of_a_vae_that_are_no_32_groups_are_refused():
    name = "encoder.down.0.block.0.conv1.weight"
    with pytest.raises(CheckpointError, match=rf"^vae: the 48 channels of {name} do not divide into 32 groups"):
        infer_config("vae", {name: (48, 48, 3, 3)})
