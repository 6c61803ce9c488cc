"""Bad input stops a conversion before anything is written, and everything wrong is said at once."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from seg4diff_jax.convert.__main__ import main
from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.models.sd3.model import MMDiTConfig
from tests.reference.checkpoints import make_checkpoint
from tests.reference.damage import edit, refusal


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sound") / "sd3", dtype=torch.float16, max_shard_size="500KB")


@pytest.fixture(scope="module")
def sound_native(sound: Path) -> Path:
    convert_checkpoint(sound, sound.parent / "native", components=["transformer", "vae", "text_encoder"])
    return sound.parent / "native"


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "sd3"))


@pytest.fixture
def native(sound_native: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_native, tmp_path / "native"))


def vae_file(checkpoint: Path) -> Path:
    return checkpoint / "vae" / "diffusion_pytorch_model.safetensors"


def clip_file(checkpoint: Path) -> Path:
    return checkpoint / "text_encoder" / "model.safetensors"


def test_a_missing_shard_is_named_with_the_index_that_wants_it(checkpoint: Path):
    shard = sorted((checkpoint / "transformer").glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    assert f"{shard}: missing shard, named by diffusion_pytorch_model.safetensors.index.json" in refusal(checkpoint)


def test_a_truncated_shard_is_named(checkpoint: Path):
    shard = sorted((checkpoint / "transformer").glob("*-00002-of-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refusal(checkpoint)
    assert f"{shard}: truncated" in message
    assert "missing tensor" not in message  # a consequence, not the cause


def test_a_shard_that_holds_other_tensors_than_its_index_says_is_refused(checkpoint: Path):
    index = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    listing = json.loads(index.read_text())
    names = sorted(listing["weight_map"])
    listing["weight_map"][names[0]] = listing["weight_map"][names[-1]]
    index.write_text(json.dumps(listing))
    message = refusal(checkpoint)
    assert f"{names[0]} is missing" in message
    assert f"{names[0]} is surplus" in message


def test_an_index_cannot_point_outside_its_folder(checkpoint: Path):
    index = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    listing = json.loads(index.read_text())
    listing["weight_map"][min(listing["weight_map"])] = "../vae/diffusion_pytorch_model.safetensors"
    index.write_text(json.dumps(listing))
    assert "expected for each tensor the name of a file in this folder" in refusal(checkpoint)


@pytest.mark.parametrize("value", [None, 7, ["a"], {"file": "a"}, "a\0b", "a/b", "x" * 5000])
def test_an_index_names_a_file_for_each_tensor(checkpoint: Path, value):
    index = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    listing = json.loads(index.read_text())
    name = min(listing["weight_map"])
    listing["weight_map"][name] = value
    index.write_text(json.dumps(listing))
    with pytest.raises(CheckpointError, match=rf"json: weight_map: .*the name of a file .{{,130}} for '{name}'$"):
        open_source(checkpoint).component("transformer")


def test_a_wrong_shape_says_what_was_expected(checkpoint: Path):
    edit(clip_file(checkpoint), lambda state: state.update({"text_projection.weight": torch.zeros(24, 31)}))
    assert "wrong shape of text_projection.weight: expected [24, 32], found [24, 31]" in refusal(checkpoint)


def test_two_faults_in_two_components_are_both_listed(checkpoint: Path):
    edit(vae_file(checkpoint), lambda state: state.pop("decoder.conv_out.bias"))
    edit(clip_file(checkpoint), lambda state: state.update({"text_model.unheard_of.weight": torch.zeros(3)}))
    message = refusal(checkpoint)
    assert "missing tensor decoder.conv_out.bias [3]" in message
    assert "surplus tensor text_model.unheard_of.weight [3]" in message


def test_missing_tensors_and_surplus_layers_have_their_names_in_the_file(checkpoint: Path):
    index = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    listing = json.loads(index.read_text())
    lost, kept = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"
    file = checkpoint / "transformer" / listing["weight_map"].pop(lost)
    edit(file, lambda state: state.update({"transformer_blocks.99.attn.to_q.weight": state.pop(lost)}))
    listing["weight_map"]["transformer_blocks.99.attn.to_q.weight"] = file.name
    index.write_text(json.dumps(listing))
    message = refusal(checkpoint)
    assert f"missing tensor {lost} [64, 64]" in message
    assert "surplus tensor transformer_blocks.99.attn.to_q.weight [64, 64]: the configured model has no" in message
    assert kept not in message
    assert "blocks.0.image" not in message  # our own name for it
    assert "blocks.99.image" not in message


def test_a_configuration_that_is_not_implemented_is_named(checkpoint: Path):
    config = checkpoint / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"qk_norm": "layer_norm"}))
    message = refusal(checkpoint)
    assert "transformer" in message
    assert "qk_norm is 'layer_norm'" in message


@pytest.mark.parametrize(
    ("component", "key", "value"),
    [
        ("transformer", "num_layers", "six"),
        ("transformer", "num_layers", None),
        ("transformer", "num_attention_heads", True),
        ("transformer", "patch_size", 0),
        ("transformer", "dual_attention_layers", "0"),
        ("transformer", "dual_attention_layers", 3),
        ("transformer", "expert_block", "nine"),
        ("vae", "block_out_channels", 8),
        ("vae", "block_out_channels", "8888"),
        ("vae", "scaling_factor", None),
        ("vae", "latent_channels", 1.5),
        ("text_encoder", "hidden_size", "32"),
        ("text_encoder_3", "num_layers", [3]),
    ],
)
def test_a_configuration_with_a_wrong_type_names_component_and_key(checkpoint: Path, component: str, key: str, value):
    config = checkpoint / component / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    message = refusal(checkpoint)
    assert component in message
    assert f"{key} is {value!r}; expected " in message


@pytest.mark.parametrize(("key", "value"), [("num_layers", "six"), ("patch_size", 2.0), ("sample_size", -1)])
def test_the_transformers_configuration_names_a_wrong_integer(key: str, value):
    with pytest.raises(ValueError, match=re.escape(f"{key} is {value!r}; expected a positive integer")):
        MMDiTConfig.from_json({key: value})


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_broken_json_is_named(checkpoint: Path, file: str):
    (checkpoint / file).write_text('{"half": ')
    assert f"{checkpoint / file}: not JSON" in refusal(checkpoint)


def test_a_folder_that_the_index_names_and_that_is_absent_is_named(checkpoint: Path):
    shutil.rmtree(checkpoint / "vae")
    assert "model_index.json names vae" in refusal(checkpoint)


def test_a_directory_of_something_else_is_no_checkpoint(tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    message = refusal(photos)
    assert f"{photos} has neither manifest.json nor model_index.json; give a directory with manifest.json" in message
    assert (
        "model_index.json (as diffusers does), the folder of a transformer alone, a single .safetensors file" in message
    )
    (photos / "sd3.safetensors").write_bytes(b"")
    assert "(it holds sd3.safetensors: is one of these meant?)" in refusal(photos)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("model_index.json", "file"),
        ("vae/config.json", "file"),
        ("vae/diffusion_pytorch_model.safetensors", "file"),
        ("transformer", "folder"),
        ("tokenizer", "folder"),
    ],
)
def test_a_part_of_a_checkpoint_is_answered_with_the_directory_that_holds_it(checkpoint: Path, given: str, kind: str):
    with pytest.raises(CheckpointError, match=f"{given} is one {kind} of a checkpoint: give .*, {checkpoint}$"):
        open_source(checkpoint / given)


def test_a_part_of_a_converted_directory_is_answered_likewise(native: Path):
    for given in ("manifest.json", "vae", "vae/config.json"):
        with pytest.raises(CheckpointError, match=f"{given} is one .* of a checkpoint: give .*, {native}$"):
            open_source(native / given)


def test_a_lone_json_file_is_answered_with_the_forms_of_a_checkpoint(tmp_path: Path):
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"settings\.json is no checkpoint; give a directory with manifest\.json"):
        open_source(tmp_path / "settings.json")


def test_pickled_weights_are_refused_unread(checkpoint: Path):
    vae_file(checkpoint).rename(checkpoint / "vae" / "diffusion_pytorch_model.bin")
    message = refusal(checkpoint)
    assert "diffusion_pytorch_model.bin: pickled weights can run code" in message
    assert "safe_serialization=True" in message


def test_a_folder_without_weights_says_what_was_expected(checkpoint: Path):
    vae_file(checkpoint).unlink()
    message = refusal(checkpoint)
    assert "expected diffusion_pytorch_model.safetensors" in message
    assert "found config.json" in message


def test_shards_without_their_index_are_refused(checkpoint: Path):
    (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert "shards without their index" in refusal(checkpoint)


def test_components_and_sources_that_do_not_exist_are_named(checkpoint: Path):
    assert "no component is called unet; there are transformer" in refusal(checkpoint, components=["unet"])
    shutil.rmtree(checkpoint / "text_encoder_3")
    index = json.loads((checkpoint / "model_index.json").read_text()) | {"text_encoder_3": [None, None]}
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    assert "has no text_encoder_3" in refusal(checkpoint, components=["text_encoder_3"])
    assert "no such file or directory, and not a Hub id" in refusal(checkpoint.parent / "nowhere")
    with pytest.raises(CheckpointError, match="has no text_encoder_3; it has transformer, vae"):
        load_component(open_source(checkpoint), "text_encoder_3")


def test_nothing_but_a_checkpoint_is_ever_overwritten(sound_native: Path, checkpoint: Path):
    target = checkpoint.parent / "precious"
    target.mkdir()
    (target / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="precious exists and is not a checkpoint"):
            convert_checkpoint(checkpoint, target, overwrite=overwrite)
    assert (target / "thesis.tex").read_text() == "x"
    with pytest.raises(CheckpointError, match="inside the other"):
        convert_checkpoint(checkpoint, checkpoint / "native")


def test_too_little_space_is_said_before_anything_is_written(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert re.search(r"target needs \d+ MB, .* has 1 MB of free space", refusal(checkpoint))


def test_a_former_target_survives_a_refused_overwrite(native: Path, checkpoint: Path):
    vae_file(checkpoint).write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        convert_checkpoint(checkpoint, native, overwrite=True)
    open_source(native).component("transformer").check()


def test_the_command_prints_one_message_and_fails(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    vae_file(checkpoint).write_bytes(b"")
    assert main(["checkpoint", str(checkpoint), str(checkpoint.parent / "target")]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {vae_file(checkpoint)}: truncated")
    assert "Traceback" not in printed


def test_a_converted_directory_without_its_manifest_is_not_loadable(native: Path):
    (native / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither manifest\.json nor model_index\.json; give"):
        load_component(native, "vae")


def test_missing_parts_and_changed_files_of_a_converted_directory_are_all_listed(native: Path):
    shutil.rmtree(native / "transformer" / "params" / "blocks.3")
    (native / "vae" / "config.json").write_text("{}")
    (native / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_component(native, "vae")
    assert "blocks.3: missing part" in str(caught.value)
    assert "vae/config.json: changed" in str(caught.value)
    assert "tokenizer/merges.txt: missing file" in str(caught.value)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_parameter_of_a_converted_directory_is_noticed(native: Path, damage: str):
    name = "blocks.3.image.attention.q.kernel"
    file = native / "transformer" / "params" / "blocks.3" / name / "0.0"
    data = file.read_bytes()
    if damage == "flip":
        file.write_bytes(data[:7] + bytes([data[7] ^ 1]) + data[8:])
    elif damage == "truncate":
        file.write_bytes(data[:-2])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"transformer/params/blocks\.3.*convert the original again"):
        load_component(native, "transformer")
    load_component(native, "transformer", depth=3)  # what is sound and needed still loads


def test_a_format_from_the_future_is_refused(native: Path):
    manifest = json.loads((native / "manifest.json").read_text())
    (native / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(CheckpointError, match=r"version 1, found .* version 99"):
        open_source(native)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": None}, "missing files"),
        ({"components": None}, "missing components"),
        ({"model_index": None}, "missing model_index"),
        ({"expert_block": None}, "missing expert_block"),
        ({"expert_block": "nine"}, "expert_block is 'nine'; expected an integer or null"),
        ({"files": ["a"]}, "expected an object as files, found a list"),
        ({"components": {"unet": {}}}, "no component is called 'unet'"),
        ({"components": {"vae": {"base": {"conv_in": {"shape": [3]}}}}}, "vae: expected each parameter's shape, dtype"),
    ],
)
def test_a_manifest_of_the_right_version_and_wrong_content_is_refused(native: Path, change: dict, message: str):
    """`None` takes a key away."""
    manifest = json.loads((native / "manifest.json").read_text()) | change
    manifest = {key: value for key, value in manifest.items() if key not in change or value is not None}
    (native / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=re.escape(f"{native / 'manifest.json'}: {message}")):
        open_source(native)


def test_a_manifest_that_contradicts_its_configuration_is_refused(native: Path):
    path = native / "manifest.json"
    manifest = json.loads(path.read_text())
    part = manifest["components"]["vae"]["base"]
    part["encoder.conv_in.colour"] = part.pop("encoder.conv_in.bias")
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as caught:
        load_component(native, "vae")
    assert "missing parameter encoder.conv_in.bias" in str(caught.value)
    assert "surplus parameter encoder.conv_in.colour" in str(caught.value)


def test_a_sound_converted_directory_loads(native: Path):
    model = load_component(native, "vae")
    assert model.encoder.conv_in.kernel.dtype == np.float16  # pyright: ignore[reportAttributeAccessIssue]
