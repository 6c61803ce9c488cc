"""What adapters cannot be, or cannot be read safely, is refused; every offending tensor is listed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seg4diff_jax.convert.__main__ import main
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.lora.adapters import attach_lora, convert_lora, load_lora
from seg4diff_jax.models.lora import IMAGE_ATTENTION
from seg4diff_jax.models.sd3.model import MMDiT
from tests.reference.adapters import (
    BLOCKS,
    PREFIX,
    RANK,
    SUFFIX,
    TARGETS,
    WIDTH,
    factors,
    release_names,
    write_release,
)


@pytest.fixture
def bare_release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "bare.pth", release_names(factors()))


@pytest.fixture(scope="module")
def base(sd3_checkpoint: Path) -> MMDiT:
    return load_component(sd3_checkpoint, "transformer")


class Malicious:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, capsys):
    witness = tmp_path / "witness"
    tensors = release_names(factors())
    for number, beside in enumerate(
        ({"hook": Malicious(f"touch {witness}")}, {"model": Malicious(f"touch {witness}")})
    ):
        path = tmp_path / f"{number}.pth"
        torch.save({"model": tensors} | beside, path)
        with pytest.raises(
            CheckpointError, match=r"refused: it refers to \w+\.system, and loading that could run code"
        ):
            load_lora(path)
        assert main(["lora", str(path), str(tmp_path / "out.safetensors")]) == 1
        assert "refused" in capsys.readouterr().err
    assert not witness.exists()
    assert not (tmp_path / "out.safetensors").exists()


OFFENDERS = {
    "transformer_blocks.0.attn.to_q.lora_A.weight": None,
    "transformer_blocks.1.attn.to_q.lora_A.weight": (RANK + 1, WIDTH),
    "transformer_blocks.1.attn.to_q.lora_B.weight": (WIDTH, RANK + 1),
    "transformer_blocks.2.attn.to_k.lora_A.weight": (RANK + 2, WIDTH),
    "transformer_blocks.3.attn.to_v.lora_A.weight": (RANK, WIDTH + 4),
    "transformer_blocks.4.attn.to_v.lora_A.weight": None,
    "transformer_blocks.4.attn.to_v.lora_B.weight": None,
    "transformer_blocks.5.attn.to_k.lora_B.weight": (WIDTH, RANK, 1),
    "transformer_blocks.0.attn.to_w.lora_A.weight": (RANK, WIDTH),
    "transformer_blocks.0.attn.to_q.lora_C.weight": (RANK, WIDTH),
}
FOUND = (
    "transformer_blocks.0.attn.to_q.lora_B{}.weight: its A is missing",
    "transformer_blocks.2.attn.to_k.lora_A{}.weight: A and B have different ranks, 5 and 3",
    "transformer_blocks.3.attn.to_v.lora_A{}.weight: the layer has (68, 64) inputs and outputs, in other blocks (64, ",
    "transformer_blocks.5.attn.to_k.lora_B{}.weight: expected a matrix of floating-point numbers",
    "transformer_blocks.0.attn.to_w.lora_A{}.weight is not a tensor of an adapter",
    "transformer_blocks.0.attn.to_q.lora_C{}.weight is not a tensor of an adapter",
)
WHERE_LAYERS_ARE_STATED = "missing: an adapter of blocks.4.image.attention.v"
WHERE_ONE_RANK_IS_STATED = "transformer_blocks.1.attn.to_q.lora_A{}.weight: expected rank 3, found 4"


@pytest.mark.parametrize("form", ["release", "diffusers", "peft"])
def test_every_unknown_incomplete_or_misshapen_tensor_is_listed(tmp_path, form):
    tensors = factors()
    for name, shape in OFFENDERS.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    path = tmp_path / f"lora{SUFFIX[form]}"
    if form == "release":
        write_release(path, release_names(tensors) | {PREFIX + "pos_embed.proj.weight": torch.zeros(3)})
    elif form == "diffusers":
        save_file({f"transformer.{name}": tensor for name, tensor in tensors.items()}, path)
    else:
        path.mkdir()
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": TARGETS}
        (path / "adapter_config.json").write_text(json.dumps(settings))
        save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_lora(path)
    # A file that says neither may have several ranks, and layers that are adapted in some blocks alone.
    problems = FOUND + ((WHERE_ONE_RANK_IS_STATED,) if form != "diffusers" else ())
    problems += (WHERE_LAYERS_ARE_STATED,) if form == "peft" else ()
    problems += ("pos_embed.proj.weight is of a layer outside SD3's blocks",) if form == "release" else ()
    for problem in problems:
        assert problem.format(".default" if form == "release" else "") in str(error.value)
    assert f"({len(problems)} problems)" in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"to_q": 4}}, "transformer_blocks.5.attn.to_q.lora_A.weight: expected rank 4, found 3"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; 'none' is implemented"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 4}, "expected rank 4, found 3"),
        ({"r": None}, "r is None; expected a positive whole number"),
        ({"target_modules": [*TARGETS, "add_q_proj"]}, "missing: an adapter of blocks.0.text.attention.q"),
        ({"target_modules": TARGETS[:3]}, "transformer_blocks.5.attn.to_out.0 is not among target_modules"),
        ({"target_modules": r".*\.attn\.to_[qkv]"}, "transformer_blocks.5.attn.to_out.0 is not among target_modules"),
    ],
)
def test_settings_of_peft_that_are_not_implemented_or_not_met_are_refused(tmp_path, change, message):
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": TARGETS} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({f"base_model.model.{n}": t for n, t in factors().items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_lora(tmp_path)
    assert message in str(error.value)


def test_adapters_that_do_not_fit_the_model_name_file_and_layers(tmp_path, base):
    wide = {n: torch.zeros(RANK, 96) if ".lora_A" in n else torch.zeros(96, RANK) for n in factors()}
    path = write_release(tmp_path / "wide.pth", release_names(wide))
    with pytest.raises(CheckpointError, match=r"wide\.pth: adapters do not match the model") as error:
        attach_lora(base, path)
    assert str(error.value).count("wrong shape: blocks.") == 4 * BLOCKS
    deep = factors() | {
        n.replace(".5.", ".6."): t for n, t in factors().items() if n.startswith("transformer_blocks.5.")
    }
    path = write_release(tmp_path / "deep.pth", release_names(deep))
    for drop_absent_blocks in (False, True):  # nothing is absent from a model that holds all its blocks
        refused = r"deep\.pth: cannot adapt blocks \[6\]: the model holds blocks 0\.\.5"
        with pytest.raises(CheckpointError, match=refused):
            attach_lora(base, path, drop_absent_blocks=drop_absent_blocks)


def test_files_that_are_not_adapters_are_named(tmp_path, bare_release):
    empty = tmp_path / "empty"
    empty.mkdir()
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(bare_release.read_bytes()[:5000])
    convert_lora(bare_release, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-8])
    for name, message in {
        "absent.pth": "no such file or directory",
        "empty": "no adapters: expected adapters.safetensors, adapter_model.safetensors",
        "other.safetensors": "no adapters of SD3's transformer.*found weight",
        "other.pth": "no adapters: expected a `model` with names like",
        "cut.pth": r"truncated, or not a file of torch\.save",
        "cut.safetensors": "truncated",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            load_lora(tmp_path / name)


def test_a_native_file_whose_header_disagrees_with_its_tensors_is_refused(tmp_path, bare_release):
    path = tmp_path / "native.safetensors"
    convert_lora(bare_release, path)
    tensors = load_file(path)
    stated = {"version": 1, "rank": RANK, "alpha": 16.0, "targets": IMAGE_ATTENTION, "blocks": [0, 1], "others": []}
    for change, message in (
        ({}, r"its header names other blocks than its tensors are of"),
        ({"version": 9}, "expected version 1, found 9"),
        ({"rank": 4}, "expected rank 4, found 3"),
        ({"others": ["head"]}, "missing: head"),
        ({"rank": None}, "its header does not describe its adapters"),
    ):
        metadata = {"format": "seg4diff-jax lora", "lora": json.dumps(stated | change)}
        save_file(tensors, path, metadata)
        with pytest.raises(CheckpointError, match=message):
            load_lora(path)


def test_without_pytorch_one_sentence_names_the_extra(bare_release, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"need PyTorch: pip install torch, or use a safetensors format"):
        load_lora(bare_release)


@pytest.mark.parametrize("lost", ["transformer_blocks.2.", "transformer_blocks.2.attn.to_q"])
def test_layers_that_settings_name_and_the_file_lacks_are_an_error_by_block_too(tmp_path, lost):
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": TARGETS}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {f"base_model.model.{name}": tensor for name, tensor in factors().items() if lost not in name}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: an adapter of blocks\.2\.image\.attention\.q, transformer_b"):
        load_lora(tmp_path)
