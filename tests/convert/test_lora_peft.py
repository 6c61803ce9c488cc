"""PEFT's settings mean what they mean to PEFT; what is not read is refused by name."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.lora.adapters import load_lora, read_lora
from seg4diff_jax.convert.lora.peft import SETTINGS
from tests.reference.adapters import RANK, TARGETS, factors


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **settings) -> Path:
    folder.mkdir(exist_ok=True)
    stated = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": TARGETS} | settings
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    tensors = {f"base_model.model.{name}": tensor for name, tensor in (tensors or factors()).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize(("settings", "alpha"), [({}, 12), ({"use_rslora": True}, 12 * RANK**0.5)])
def test_settings_beside_names_without_pefts_prefix_are_pefts(tmp_path, prefix, settings, alpha):
    """`get_peft_model_state_dict` gives such names, and `set_peft_model_state_dict` takes them."""
    write(tmp_path, lora_alpha=12, **settings)
    save_file({f"{prefix}{name}": tensor for name, tensor in factors().items()}, tmp_path / "adapter_model.safetensors")
    assert load_lora(tmp_path)[0].alpha == pytest.approx(alpha)


def test_settings_beside_names_without_pefts_prefix_can_be_refused(tmp_path):
    write(tmp_path, init_lora_weights="pissa")
    save_file(factors(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="pissa"):
        load_lora(tmp_path)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8)})
        self.ff = torch.nn.ModuleDict(
            {"net": torch.nn.ModuleList([torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})])}
        )


class Blocks(torch.nn.Module):
    """Two layers of two blocks, called as SD3's are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.transformer_blocks = torch.nn.ModuleList([Block(), Block()])


def saved(folder: Path, **settings) -> tuple[dict[str, torch.Tensor], Path]:
    """The weights that PEFT merges an adapter it saved to, and the folder."""
    model = get_peft_model(Blocks(), LoraConfig(**({"r": 2, "target_modules": ["to_q", "ff.net.0.proj"]} | settings)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(Blocks(), folder).merge_and_unload().state_dict(), folder


NAMES = {"image.attention.q": "attn.to_q", "image.mlp.up": "ff.net.0.proj"}


def assert_merges_as_peft(folder: Path, merged: dict[str, torch.Tensor]) -> None:
    config, adapters = load_lora(folder)
    base = Blocks().state_dict()
    for block in range(2):
        for ours, theirs in NAMES.items():
            name = f"transformer_blocks.{block}.{theirs}.weight"
            pair = adapters.get(f"blocks.{block}.{ours}")
            change = config.scale * torch.from_numpy((pair.a @ pair.b).T) if pair else 0
            torch.testing.assert_close(base[name] + change, merged[name], rtol=1e-6, atol=1e-6)


def test_every_setting_of_peft_has_its_place_in_the_table():
    assert {field.name for field in dataclasses.fields(LoraConfig)} == SETTINGS.keys()


@pytest.mark.parametrize(
    "settings",
    [
        *({"init_lora_weights": start} for start in (True, False, "gaussian", "orthogonal", "eva", "mica")),
        {"use_rslora": True, "lora_alpha": 3},
        {"fan_in_fan_out": True},
        {"lora_dropout": 0.5},
        {"target_modules": r".*\.(to_q|ff\.net\.0\.proj)"},
        {"target_modules": "all-linear"},
        {"exclude_modules": r".*\.1\.attn\..*"},
        {"exclude_modules": ["transformer_blocks.0.ff.net.0.proj"]},
        {"target_modules": ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"]},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 1, "layers_pattern": "transformer_blocks"},
        {"rank_pattern": {"to_q": 3}, "alpha_pattern": {r"1\..*": 5}, "use_rslora": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_settings_mean_what_they_mean_to_peft(tmp_path, settings):
    merged, folder = saved(tmp_path / "peft", **settings)
    assert_merges_as_peft(folder, merged)


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "PISSA", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new"]
)
def test_adapters_of_a_changed_base_are_refused(tmp_path, start):
    with pytest.raises(CheckpointError, match=f"init_lora_weights is '{start}': training changed the base's weights"):
        load_lora(write(tmp_path, init_lora_weights=start))


def test_every_setting_that_is_not_read_is_refused_at_once(tmp_path):
    off = {key: True for key, kind in SETTINGS.items() if kind == "off"}
    later = {"use_of_tomorrow": 3, "use_of_today": None, "no_use": False, "empty": {}}
    with pytest.raises(CheckpointError) as error:
        load_lora(write(tmp_path, **off, **later, bias="all", init_lora_weights="pissa"))
    for key in [*off, "use_of_tomorrow", "bias", "init_lora_weights"]:
        assert f"adapter_config.json: {key} is " in str(error.value)
    assert f"({len(off) + 3} problems)" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": True}, "r is True; expected a positive whole number"),
        ({"r": 10**12}, "r is 1000000000000; expected a positive whole number"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected a finite positive number"),
        ({"lora_alpha": float("inf")}, "adapter_config.json: not JSON: Infinity is no number"),
        ({"lora_alpha": float("nan")}, "adapter_config.json: not JSON: NaN is no number"),
        ({"lora_alpha": 10**20}, "expected a finite positive number"),
        ({"lora_alpha": 10**400}, "a number of 401 digits"),
        ({"target_modules": {"to_q": 1}}, "expected names or a pattern"),
        ({"target_modules": [["to_q"]]}, "expected names or a pattern"),
        ({"rank_pattern": ["to_q"]}, "expected positive whole numbers by pattern"),
        ({"alpha_pattern": {"to_q": -1}}, "expected finite positive numbers by pattern"),
        ({"layers_to_transform": "3"}, "expected whole numbers"),
        ({"target_modules": "("}, "one of its patterns is no regular expression"),
        ({"target_modules": "(a" * 3000}, "one of its patterns is no regular expression"),
    ],
)
def test_settings_of_a_wrong_kind_are_named(tmp_path, settings, message):
    with pytest.raises(CheckpointError, match=r"adapter_(model\.safetensors|config\.json)") as error:
        load_lora(write(tmp_path, **settings))
    assert message in str(error.value)


def test_patterns_without_an_end_are_given_up(tmp_path):
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="its patterns take more than"):
        load_lora(write(tmp_path, target_modules=r"(.|[^b])*(.|[^c])*(.|[^d])*[!?]"))
    assert time.monotonic() - start < 30


def test_ten_thousand_layers_are_answered_at_once(tmp_path):
    names = [f"transformer_blocks.{block}.attn.to_q" for block in range(10_000)]
    tensors = {f"{name}.lora_{side}.weight": torch.zeros(1, 1) for name in names for side in "AB"}
    folder = write(tmp_path, tensors, r=1, target_modules=names)
    start = time.monotonic()
    assert len(load_lora(folder)[1]) == 10_000
    assert time.monotonic() - start < 60


def test_the_named_file_is_what_is_read(tmp_path):
    folder = write(tmp_path)
    other = {name: 2 * tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(other, folder / "step500.safetensors")
    named, beside = (read_lora(folder / f"{name}.safetensors") for name in ("step500", "adapter_model"))
    for layer, adapter in named.adapters.items():
        assert (adapter.a == 2 * beside.adapters[layer].a).all()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: no such file; it has to lie beside step500"):
        read_lora(folder / "step500.safetensors")


def test_a_directory_of_several_files_is_not_guessed_about(tmp_path):
    write(tmp_path)
    save_file({f"transformer.{n}": t for n, t in factors().items()}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(CheckpointError, match=r"several files of adapters.*adapter_model\.safetensors, pytorch_lora"):
        load_lora(tmp_path)
