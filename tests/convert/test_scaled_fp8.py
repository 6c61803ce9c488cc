"""Scaled fp8 is value x scale, in every place where people keep it; what is quantised otherwise is named at once."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from seg4diff_jax.convert.components import COMPONENTS
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.sources.native import NativeComponent
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.convert.sources.text_encoders import open_files
from tests.reference.weight_files import CONFIGS, Arrays, random_tensors, write_plain

FP8 = ml_dtypes.float8_e4m3fn


@pytest.fixture(scope="module")
def transformer() -> Arrays:
    return random_tensors("transformer", "stability")


def scaled(tensors: Arrays, suffix: str, *, per_row: bool = False) -> Arrays:
    """Matrices as fp8 with a scale each, as ComfyUI's tools write them."""
    result: Arrays = {}
    for name, array in tensors.items():
        if array.ndim != 2:
            result[name] = array.astype(np.float16)
            continue
        scale = np.abs(array).max(axis=1, keepdims=True) / 448 if per_row else np.float32(np.abs(array).max() / 448)
        result[name] = (array / scale).astype(FP8)
        result[name.removesuffix("weight") + suffix] = np.asarray(scale, np.float32)
        result[name.removesuffix("weight") + suffix.replace("weight", "input")] = np.asarray(3.0, np.float32)
    return result


def product(file: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """What PyTorch makes of such a file's matrices."""
    state = load_file(file)
    scales = {
        name.replace(suffix, "weight"): scale.float()
        for suffix in ("scale_weight", "weight_scale")
        for name, scale in state.items()
        if name.endswith(suffix)
    }
    return {name.removeprefix(prefix): state[name].float() * scale for name, scale in scales.items()}


def assert_products(source, component: str, expected: dict[str, torch.Tensor]) -> None:
    reader = source.component(component)
    reader.check()
    assert len(expected) > 10
    found = reader.tensors
    assert not [name for name in found if "scale" in name or "comfy" in name]
    for name, theirs in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name].read(), theirs.numpy(), err_msg=name)
    assert sum(1 for _ in reader.parameters()) == len(reader.layout())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("suffix", "per_row"), [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)]
)
def test_a_weight_is_its_value_times_its_scale(
    tmp_path: Path, transformer: Arrays, prefix: str, suffix: str, per_row: bool
):
    tensors = {prefix + name: array for name, array in scaled(transformer, suffix, per_row=per_row).items()}
    if suffix == "scale_weight":
        tensors[f"{prefix}scaled_fp8"] = np.zeros(2, FP8)
    else:
        note = np.frombuffer(json.dumps({"format": "float8_e4m3fn"}).encode(), np.uint8)
        tensors |= {name.replace(suffix, "comfy_quant"): note for name in list(tensors) if name.endswith(suffix)}
    file = write_plain(tmp_path / "sd3.safetensors", tensors)
    assert_products(open_source(file), "transformer", product(file, prefix))


def test_so_it_is_in_a_text_encoders_own_file_and_in_a_diffusers_folder(tmp_path: Path):
    file = tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors"
    tensors = scaled(random_tensors("text_encoder_3", "stability"), "scale_weight")
    write_plain(file, tensors | {"scaled_fp8": np.zeros(0, FP8)})
    assert_products(open_files(tmp_path, ["text_encoder_3"], None), "text_encoder_3", product(file))
    assert_products(open_source(folder(tmp_path / "sd3", "text_encoder_3", tensors)), "text_encoder_3", product(file))


def folder(directory: Path, component: str, tensors: Arrays, config: dict | None = None) -> Path:
    """A diffusers directory of one component."""
    (directory / component).mkdir(parents=True)
    (directory / "model_index.json").write_text(json.dumps({component: ["library", "Class"]}))
    (directory / component / "config.json").write_text(json.dumps(CONFIGS[component] | (config or {})))
    write_plain(directory / component / f"{COMPONENTS[component].weights}.safetensors", tensors)
    return directory


def test_a_transformers_own_names_need_no_prefix_and_no_configuration(tmp_path: Path):
    tensors = random_tensors("transformer", "diffusers")
    found = open_source(write_plain(tmp_path / "sd3.safetensors", tensors))
    expected = open_source(folder(tmp_path / "sd3", "transformer", tensors)).component("transformer")
    arrays = dict(found.component("transformer").parameters())
    for name, array in expected.parameters():
        np.testing.assert_array_equal(arrays.pop(name), array)
    assert not arrays


# ---- what is refused ------------------------------------------------------------------------------------------------

NOTE = np.frombuffer(json.dumps({"format": "nvfp4"}).encode(), np.uint8)
ROTATED = np.frombuffer(json.dumps({"format": "float8_e4m3fn", "convrot": True}).encode(), np.uint8)
BYTES = np.zeros((256, 32), np.uint8)
FORMS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "nf4": (
        {"weight": BYTES, "weight.absmax": BYTES[0], "weight.quant_state.bitsandbytes__nf4": BYTES[0]},
        r"bitsandbytes' 4-bit weights \(nf4 or fp4\)",
    ),
    "LLM.int8": (
        {"weight": np.zeros((64, 256), np.int8), "SCB": np.ones(64, np.float32)},
        "bitsandbytes' 8-bit weights",
    ),
    "NVFP4": ({"weight": BYTES, "weight_scale": BYTES, "weight_scale_2": np.ones((), np.float32)}, "NVFP4 weights"),
    "blocks": (
        {"weight": np.ones((64, 256), FP8), "weight_scale_inv": np.ones((1, 2), np.float32)},
        "fp8 weights in b",
    ),
    "MXFP8": (
        {"weight": np.ones((64, 256), FP8), "weight_scale": np.ones((64, 8), np.uint8)},
        r"weights with a scale per block .*\(MXFP8\)",
    ),
    "int8": (
        {"weight": np.ones((64, 256), np.int8), "weight_scale": np.ones((), np.float32)},
        "int8 weights with scales",
    ),
    "GPTQ": ({"qweight": BYTES, "qzeros": BYTES, "g_idx": BYTES}, "GPTQ's or AWQ's 4-bit weights"),
    "quanto": ({"weight._data": BYTES, "weight._scale": BYTES}, "quanto's weights"),
    "a noted format": ({"weight": BYTES, "comfy_quant": NOTE}, "weights in the format 'nvfp4'"),
    "rotated": (
        {"weight": np.ones((64, 256), FP8), "weight_scale": np.ones((), np.float32), "comfy_quant": ROTATED},
        "fp8 weights with convrot",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_quantised_weights_that_are_not_read_are_named_in_one_sentence(tmp_path: Path, transformer: Arrays, form: str):
    parts, message = FORMS[form]
    layers = [name.removesuffix("weight") for name, array in transformer.items() if array.ndim == 2]
    tensors = {name: array for name, array in transformer.items() if array.ndim != 2}
    tensors |= {layer + part: array for layer in layers for part, array in parts.items()}
    with pytest.raises(CheckpointError, match=rf"^\S*sd3\.safetensors: {message}.* not read; fetch the same") as caught:
        open_source(write_plain(tmp_path / "sd3.safetensors", tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "quanto", "gptq", "awq", "fp8", None])
def test_every_quantization_config_is_refused_when_its_component_is_read(tmp_path: Path, method: str | None):
    described = {"quantization_config": {"quant_method": method, "load_in_4bit": method == "bitsandbytes"}}
    directory = folder(tmp_path / "sd3", "transformer", {"weight": BYTES}, described)
    source = open_source(directory)  # other components may be sound
    kind = "4-bit weights" if method == "bitsandbytes" else "weights"
    with pytest.raises(CheckpointError) as caught:
        source.component("transformer")
    file = directory / "transformer" / "config.json"
    assert str(caught.value).startswith(f"{file}: {kind} quantised by {method or 'an unnamed method'}, as its quant")
    assert "fetch the same model" in str(caught.value)


def test_damaged_scales_are_all_listed(tmp_path: Path, transformer: Arrays):
    tensors = scaled(transformer, "scale_weight")
    layers = [name for name in tensors if name.endswith("scale_weight")]
    tensors[layers[0]] = np.asarray(np.nan, np.float32)
    tensors[layers[1]] = np.asarray(-1, np.float32)
    tensors[layers[2].replace("scale_weight", "weight_scale")] = np.ones((), np.float32)
    del tensors[layers[3].replace("scale_weight", "weight")]
    with pytest.raises(CheckpointError) as caught:
        open_source(write_plain(tmp_path / "sd3.safetensors", tensors))
    message = str(caught.value)
    assert f"{layers[0]}: expected finite numbers of at least 0, found [nan]" in message
    assert f"{layers[1]}: expected finite numbers of at least 0, found [-1.0]" in message
    assert "has two scales" in message
    assert f"{layers[3]} is the scale of {layers[3].replace('scale_weight', 'weight')}, which is missing" in message


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_])
def test_integers_and_booleans_are_no_weights_and_all_are_named(tmp_path: Path, transformer: Arrays, dtype: type):
    kind = np.dtype(dtype)
    odd = {name: transformer[name].astype(kind) for name in ("final_layer.linear.weight", "context_embedder.bias")}
    source = open_source(write_plain(tmp_path / "sd3.safetensors", transformer | odd))
    with pytest.raises(CheckpointError, match="only floating-point numbers are weights, found ") as caught:
        source.component("transformer").check()
    assert all(f"{name} {list(array.shape)} {kind}" in str(caught.value) for name, array in odd.items())


def test_integers_of_a_diffusers_folder_are_no_weights_either(tmp_path: Path):
    tensors = random_tensors("text_encoder_3", "diffusers")
    tensors["encoder.final_layer_norm.weight"] = np.ones(256, np.int32)
    source = open_source(folder(tmp_path / "sd3", "text_encoder_3", tensors))
    with pytest.raises(CheckpointError, match=r"found encoder\.final_layer_norm\.weight \[256\] int32"):
        source.component("text_encoder_3").check()


def test_integers_of_a_converted_directory_are_no_weights_either():
    records = {"base": {"pos_embed": {"shape": [4, 4, 256], "dtype": "int8", "crc32": ""}}}
    component = NativeComponent("transformer", CONFIGS["transformer"], Path("sd3/transformer/params"), records)
    with pytest.raises(CheckpointError, match=r"sd3/transformer/params: pos_embed is int8: weights are floating"):
        component.check()
