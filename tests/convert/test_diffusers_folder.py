"""Which files of a folder in diffusers' layout are read, and what is said of folders that are something else."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.components import COMPONENTS
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.readers import TorchComponent
from seg4diff_jax.convert.sources import hub
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.convert.sources.safetensors_stream import TensorInfo
from seg4diff_jax.convert.verify.torch_side import tensors_of
from tests.reference.checkpoints import make_checkpoint

T5, WEIGHTS = "text_encoder_3", "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD3 with T5, fp16."""
    return make_checkpoint(tmp_path_factory.mktemp("sd3") / "diffusers", dtype=torch.float16)


def test_variants_are_found_and_preferred_as_asked(original: Path, tmp_path: Path):
    pipeline = StableDiffusion3Pipeline.from_pretrained(original, torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "saved", variant="fp16", max_shard_size="500KB")
    assert list((tmp_path / "saved" / "transformer").glob("*.fp16-00001-of-*.safetensors"))
    for variant in ("fp16", None):
        source = open_source(tmp_path / "saved", variant=variant)
        for name in COMPONENTS:
            source.component(name).check()
    pipeline.vae.to(torch.float32).save_pretrained(tmp_path / "plain")
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "plain" / weights).rename(tmp_path / "saved" / "vae" / weights)
    dtypes = {
        variant: {
            dtype for _, dtype in open_source(tmp_path / "saved", variant=variant).component("vae").layout().values()
        }
        for variant in ("fp16", None)
    }
    assert dtypes == {"fp16": {np.dtype(np.float16)}, None: {np.dtype(np.float32)}}


@pytest.mark.parametrize("shards", ["with their index", "alone"])
@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("text_encoder", CLIPTextModelWithProjection),
        (T5, T5EncoderModel),
        ("transformer", SD3Transformer2DModel),
        ("vae", AutoencoderKL),
    ],
)
def test_of_a_whole_file_and_shards_beside_it_that_is_read_which_pytorch_reads(
    original: Path, tmp_path: Path, name: str, load: Any, shards: str
):
    layout = shutil.copytree(original, tmp_path / "layout")
    module = load.from_pretrained(layout / name)
    module.save_pretrained(layout / name)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    module.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    for file in (tmp_path / "shards").iterdir():
        if "-of-" in file.name or (shards == "with their index" and file.name.endswith(".index.json")):
            shutil.copy(file, layout / name)
    theirs = load.from_pretrained(layout / name).state_dict()
    component = open_source(layout).component(name)
    assert isinstance(component, TorchComponent)
    assert all(torch.equal(read(), theirs[key]) for key, read in tensors_of(component).items())
    read = {tensor.file.name for tensor in component.tensors.values() if isinstance(tensor, TensorInfo)}
    fetched = hub.needed_files([f"{name}/{path.name}" for path in (layout / name).iterdir()], [name], "")
    assert {file for file in fetched if file.endswith(".safetensors")} == {f"{name}/{file}" for file in read}


@pytest.mark.parametrize("differ", [False, True])
def test_two_names_of_one_matrix_have_to_hold_the_same_numbers(original: Path, tmp_path: Path, differ: bool):
    layout = shutil.copytree(original, tmp_path / "layout")
    shutil.rmtree(layout / T5)
    T5EncoderModel.from_pretrained(original / T5).save_pretrained(layout / T5)
    weights = layout / T5 / "model.safetensors"
    tensors = load_file(weights)
    again = tensors["shared.weight"].clone()
    again[3, 5] += differ
    save_file(tensors | {"encoder.embed_tokens.weight": again}, weights, {"format": "pt"})
    said = r"shared\.weight and encoder\.embed_tokens\.weight are one parameter, and hold different numbers: leave out"
    for read in (lambda: convert_checkpoint(layout, tmp_path / "native"), lambda: load_component(layout, T5)):
        with pytest.raises(CheckpointError, match=said) if differ else nullcontext():
            read()


def test_of_two_variants_none_is_guessed(original: Path, tmp_path: Path):
    layout = shutil.copytree(original, tmp_path / "layout")
    weights = layout / "vae" / "diffusion_pytorch_model.safetensors"
    for variant in ("bf16", "fp16"):
        shutil.copy(weights, weights.with_suffix(f".{variant}.safetensors"))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"vae: weights of variants bf16 and fp16, .* choose by --variant"):
        convert_checkpoint(layout, tmp_path / "native")
    convert_checkpoint(layout, tmp_path / "native", variant="fp16")


def test_a_pipeline_with_a_unet_is_named_as_what_it_is(original: Path, tmp_path: Path):
    layout = shutil.copytree(original, tmp_path / "layout")
    index = json.loads((layout / "model_index.json").read_text())
    del index["transformer"]
    (layout / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(CheckpointError, match=r"model_index\.json names a unet, as of SDXL: expected Stable"):
        convert_checkpoint(layout, tmp_path / "native")


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_git_lfs_pointer_is_named_as_one(original: Path, tmp_path: Path, part: str):
    layout = shutil.copytree(original, tmp_path / "layout")
    weights, *_ = sorted((layout / part).glob("*.safetensors"))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 5\n")
    with pytest.raises(CheckpointError, match=r"\.safetensors: a git-lfs pointer, .*: fetch the file with"):
        convert_checkpoint(layout, tmp_path / "native")


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2", "tokenizer_3"])
@pytest.mark.parametrize("to", ["native", "diffusers"])
def test_a_damaged_tokenizer_is_refused_before_anything_is_written(
    original: Path, tmp_path: Path, folder: str, to: Literal["native", "diffusers"]
):
    layout = shutil.copytree(original, tmp_path / "layout")
    for file in (layout / folder).iterdir():
        if file.name in ("vocab.json", "tokenizer.json", "spiece.model"):
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=rf"{folder}[ /]"):
        convert_checkpoint(layout, tmp_path / "converted", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["layout"]


def test_one_tokenizer_alone_is_checked_too(original: Path, tmp_path: Path):
    layout = shutil.copytree(original, tmp_path / "layout")
    (layout / "tokenizer_3" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer_3"):
        convert_checkpoint(layout, tmp_path / "converted", components=["transformer", T5])


@pytest.mark.parametrize("whole", ["T5", "CLIP"])
def test_of_a_whole_model_in_a_text_encoders_folder_the_text_encoder_is_read(
    original: Path, tmp_path: Path, whole: str
):
    layout = shutil.copytree(original, tmp_path / "layout")
    name, load = (T5, T5EncoderModel) if whole == "T5" else ("text_encoder", CLIPTextModelWithProjection)
    config = load.from_pretrained(layout / name).config
    if whole == "T5":
        model = T5ForConditionalGeneration(config)
    else:
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes = {"image_size": 8, "patch_size": 4, "projection_dim": config.projection_dim}
        model = CLIPModel(
            CLIPConfig(text_config=config.to_dict(), vision_config=vision | sizes, projection_dim=config.projection_dim)
        )
    shutil.rmtree(layout / name)
    model.save_pretrained(layout / name)
    theirs = load.from_pretrained(layout / name)
    convert_checkpoint(layout, tmp_path / "back", to="diffusers")
    again = load.from_pretrained(tmp_path / "back" / name)
    assert again.config.to_dict().items() >= {"model_type": theirs.config.model_type}.items()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_a_transformers_folder_of_another_name_within_a_checkpoint_is_read(original: Path, tmp_path: Path):
    layout = shutil.copytree(original, tmp_path / "layout")
    shutil.copytree(layout / "transformer", layout / "transformer_ema")
    source = open_source(layout / "transformer_ema")
    source.component("transformer").check()
    assert list(source.configs) == ["transformer"]
    with pytest.raises(CheckpointError, match="give the directory above it"):
        open_source(layout / "transformer")


def test_folders_of_other_things_say_what_they_are(original: Path, tmp_path: Path):
    shutil.copytree(original / "transformer", tmp_path / "checkpoint-500" / "transformer")
    with pytest.raises(CheckpointError, match=r"\(a transformer alone is in \S+/checkpoint-500/transformer: is that"):
        open_source(tmp_path / "checkpoint-500")
    folder = shutil.copytree(original / "transformer", tmp_path / "controlnet")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "SD3ControlNetModel"}))
    with pytest.raises(CheckpointError, match=r"\(it is the folder of a SD3ControlNetModel\)"):
        open_source(folder)
    shard = shutil.copy(folder / WEIGHTS, tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"is one of several shards: give the folder that holds them all"):
        open_source(shard)
