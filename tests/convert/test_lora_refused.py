"""Adapters of other kinds, numbers that are none, and damage are refused with their names."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.lora.adapters import convert_lora, load_lora, read_lora
from tests.reference.adapters import RANK, WIDTH, factors, mask_head, release_names, write_release

FIRST = "transformer.transformer_blocks.0.attn.to_q"


def diffusers_file(path: Path, metadata: dict[str, str] | None = None, **change: torch.Tensor) -> Path:
    save_file({f"transformer.{name}": tensor for name, tensor in factors().items()} | change, path, metadata)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{FIRST}.dora_scale", "DoRA"),
        (f"{FIRST}.lora_magnitude_vector", "DoRA"),
        (f"{FIRST}.lora_magnitude_vector.weight", "DoRA"),
        (f"{FIRST}.lokr_w1", "LoKr"),
        (f"{FIRST}.hada_w1_a", "LoHa"),
        (f"{FIRST}.oft_R.weight", "OFT"),
        (f"{FIRST}.lora_mid.weight", "a Tucker decomposition"),
        (f"{FIRST}.ia3_l", "IA3"),
        (f"{FIRST}.on_input", "IA3"),
        (f"{FIRST}.vera_lambda_b", "VeRA"),
        ("base_model.vera_A.default", "VeRA"),
        (f"{FIRST}.a1.weight", "GLoRA"),
        (f"{FIRST}.w_norm", "a norm's weight"),
        (f"{FIRST}.diff_b", "a difference of whole weights"),
        (f"{FIRST}.lora_B.bias", "a bias"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(tmp_path, name, kind):
    with pytest.raises(CheckpointError, match=f"surplus: {name} is {kind}, which is not implemented.*: merge it"):
        load_lora(diffusers_file(tmp_path / "lora.safetensors", **{name: torch.ones(4, 4)}))


def test_a_file_of_another_kind_alone_is_told_so(tmp_path):
    save_file({"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.ones(4, 4)}, tmp_path / "lokr.safetensors")
    with pytest.raises(CheckpointError, match=r"lokr_w1 is LoKr, which is not implemented"):
        load_lora(tmp_path / "lokr.safetensors")


@pytest.mark.parametrize("kind", ["LOHA", "VERA", "FOURIERFT"])
@pytest.mark.parametrize("part", ["hada_w1_a", "vera_lambda_b", "fourierft_spectrum"])
def test_peft_settings_of_another_kind_are_told_first(tmp_path, kind, part):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "n_frequency": 1000}))
    name = f"base_model.model.transformer_blocks.0.attn.to_q.{part}"
    save_file({name: torch.ones(4, 4)}, tmp_path / "adapter_model.safetensors")
    said = (
        f"adapter_model.safetensors: adapter_config.json: peft_type is '{kind}'; only 'LORA' is implemented: merge it"
    )
    with pytest.raises(CheckpointError, match=said) as error:
        load_lora(tmp_path)
    assert "\n" not in str(error.value)


OUTSIDE = [
    "context_embedder",
    "proj_out",
    "norm_out.linear",
    "pos_embed.proj",
    "time_text_embed.text_embedder.linear_1",
]


@pytest.mark.parametrize("layer", [*OUTSIDE, "transformer_blocks.0.attn.to_w"])
def test_layers_that_cannot_be_adapted_are_named(tmp_path, layer):
    name = f"transformer.{layer}.lora_A.weight"
    what = "of a layer outside SD3's blocks, .*: merge it" if layer in OUTSIDE else "not a tensor of an adapter of a li"
    with pytest.raises(CheckpointError, match=f"surplus: {name} is {what}"):
        load_lora(diffusers_file(tmp_path / "lora.safetensors", **{name: torch.ones(3, 4)}))


@pytest.mark.parametrize("shape", [(RANK, WIDTH, 1, 1), (RANK * WIDTH,)])
def test_a_factor_of_another_shape_is_shown_as_it_lies_in_the_file(tmp_path, shape):
    name = f"{FIRST}.lora_A.weight"
    said = f"{name}: expected a matrix of floating-point numbers, found float32 {list(shape)}"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        load_lora(diffusers_file(tmp_path / "lora.safetensors", **{name: torch.ones(shape)}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_integers_and_truth_values_are_no_weights(tmp_path, dtype):
    name = f"{FIRST}.lora_A.weight"
    with pytest.raises(
        CheckpointError, match=rf"{name}: expected a matrix of floating-point numbers, found u?(int|bool)"
    ):
        load_lora(diffusers_file(tmp_path / "lora.safetensors", **{name: torch.ones(RANK, WIDTH).to(dtype)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    broken = torch.ones(WIDTH, RANK)
    broken[3, 1] = value
    with pytest.raises(CheckpointError, match=r"lora_B\.weight: 1 of its numbers are NaN or infinite"):
        load_lora(diffusers_file(tmp_path / "lora.safetensors", **{f"{FIRST}.lora_B.weight": broken}))


@pytest.mark.parametrize(
    "alpha", [torch.tensor(0.0), torch.tensor(-1), torch.tensor(float("nan")), torch.ones(2), torch.tensor(True)]
)
def test_alpha_is_a_finite_positive_number(tmp_path, alpha):
    with pytest.raises(CheckpointError, match=rf"{FIRST}\.alpha: expected a finite positive number as alpha, found"):
        load_lora(diffusers_file(tmp_path / "lora.safetensors", **{f"{FIRST}.alpha": alpha}))
    with pytest.raises(CheckpointError, match="alpha is nan; expected a finite positive number"):
        load_lora(diffusers_file(tmp_path / "lora.safetensors"), alpha=float("nan"))


def test_fp8_adapters_are_held_exactly(tmp_path):
    tensors = {f"transformer.{name}": tensor.to(torch.float8_e4m3fn) for name, tensor in factors().items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    a = load_lora(tmp_path / "lora.safetensors")[1]["blocks.0.image.attention.q"].a
    assert np.array_equal(a.T, tensors[f"{FIRST}.lora_A.weight"].to(torch.float16).numpy())


def test_two_tensors_for_one_factor_are_refused(tmp_path):
    twice = {f"{FIRST}.lora_down.weight": torch.ones(RANK, WIDTH)}
    with pytest.raises(CheckpointError, match=r"the same layer's A as"):
        load_lora(diffusers_file(tmp_path / "lora.safetensors", **twice))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "in its header: not JSON that is read: more than 64"),
        ('{"transformer.r": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ('{"transformer.r": ' + "9" * 30 + "}", "expected a positive whole number"),
        ('{"transformer.r": 3, "transformer.r": 4}', "'transformer.r' occurs twice"),
        ("[1]", "found a list"),
        ('{"transformer.r": 3.0, "transformer.lora_alpha": 1}', "expected a positive whole number"),
        ('{"transformer.r": 3, "transformer.lora_alpha": NaN}', "expected a finite positive number"),
    ],
    ids=lambda value: value[:30],
)
def test_settings_in_a_header_are_checked(tmp_path, text, message):
    with pytest.raises(CheckpointError, match=r"lora\.safetensors") as error:
        load_lora(diffusers_file(tmp_path / "lora.safetensors", {"lora_adapter_metadata": text}))
    assert message in str(error.value)


def test_metadata_that_is_no_table_is_refused(tmp_path):
    data = diffusers_file(tmp_path / "lora.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for metadata in ([1], {"lora_adapter_metadata": 3}):
        text = json.dumps({"__metadata__": metadata} | header).encode()
        (tmp_path / "broken.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        with pytest.raises(CheckpointError, match=r"broken\.safetensors: corrupt header"):
            load_lora(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pth"])
def test_a_file_of_torch_save_is_told_by_its_content_whatever_it_is_called(tmp_path, name):
    plain = {f"transformer.{key}": tensor for key, tensor in factors().items()}
    torch.save(plain, tmp_path / name)
    found, expected = load_lora(tmp_path / name), load_lora(diffusers_file(tmp_path / "other.safetensors"))
    assert found[0] == expected[0]
    for layer, factors_of in expected[1].items():
        assert all(map(np.array_equal, found[1][layer], factors_of))
    (tmp_path / name).write_bytes(pickle.dumps(print, 2))
    with pytest.raises(CheckpointError, match=rf"{name}: refused: it refers to print"):
        load_lora(tmp_path / name)


def test_what_a_library_says_of_a_damaged_file_is_cut(tmp_path):
    """zipfile echoes both names of an entry where they differ, however long they are."""
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        file.writestr("x" * 5000, b"data")
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes().replace(b"x", b"y", 1))
    with pytest.raises(CheckpointError, match=r"a\.pth: damaged: ") as error:
        load_lora(tmp_path / "a.pth")
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_storages_that_a_legacy_file_does_not_hold_are_refused(tmp_path):
    """PyTorch asserts that each key it lists is of a storage."""
    release = release_names(factors())
    torch.save({"model": release}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pth").read_bytes()
    key = next(iter(release.values())).untyped_storage()._cdata
    place = data.rindex(str(key).encode())
    (tmp_path / "a.pth").write_bytes(data[:place] + b";" + data[place + 1 :])
    with pytest.raises(CheckpointError, match=r"a\.pth: truncated, or not a file of torch\.save: storage key"):
        load_lora(tmp_path / "a.pth")


def test_a_native_header_is_checked(tmp_path):
    convert_lora(diffusers_file(tmp_path / "lora.safetensors"), tmp_path / "native.safetensors")
    tensors = load_file(tmp_path / "native.safetensors")
    stated = {"version": 1, "rank": RANK, "alpha": 3.0, "targets": ["image.attention.q"], "blocks": [0], "others": []}
    for key, value in {"alpha": 1e400, "rank": True, "targets": "q", "blocks": [0.5], "others": [1]}.items():
        metadata = {"format": "seg4diff-jax lora", "lora": json.dumps(stated | {key: value})}
        save_file(tensors, tmp_path / "native.safetensors", metadata)
        with pytest.raises(CheckpointError, match=rf"does not describe its adapters \({key} is "):
            load_lora(tmp_path / "native.safetensors")


def test_what_a_native_header_says_of_layers_and_of_other_tensors_is_held_against_them(tmp_path):
    fewer = {name: tensor for name, tensor in factors().items() if "2.attn.to_k" not in name}
    write_release(tmp_path / "lora.pth", release_names(fewer) | mask_head())
    native = tmp_path / "native.safetensors"
    convert_lora(tmp_path / "lora.pth", native)
    assert "blocks.2.image.attention.k" not in read_lora(native).adapters
    tensors, metadata = load_file(native), safe_open(native, "pt").metadata()
    for pattern, changed in {
        r"missing: an adapter of blocks\.3\.image\.attention\.k": {
            n: t for n, t in tensors.items() if ".3." not in n or "ion.k" not in n
        },
        r"attn_score_layer\.0\.bias: expected \[64\], found \[64, 1\]": {
            n: t[:, None] if n.endswith("0.bias") else t for n, t in tensors.items()
        },
    }.items():
        save_file(changed, native, metadata)
        with pytest.raises(CheckpointError, match=pattern):
            read_lora(native)


def rewritten(source: Path, target: Path, change) -> Path:
    """A zip with its entries' contents changed, and their sums with them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


def test_numpys_scalars_beside_the_tensors_are_read_past(tmp_path):
    """As both NumPy 2 and NumPy 1 pickle them."""
    beside = {"iteration": np.int64(3), "best": np.float32(0.5), "name": np.str_("a"), "array": np.zeros(3, "u2")}
    path = write_release(tmp_path / "two.pth", release_names(factors()), **beside)
    former = lambda name, data: data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    one = rewritten(path, tmp_path / "one.pth", former)
    assert b"numpy._core" in zipfile.ZipFile(path).read("two/data.pkl")
    assert b"numpy._core" not in zipfile.ZipFile(one).read("two/data.pkl")
    for file in (path, one):
        assert read_lora(file).left_out == tuple(beside)
        assert len(load_lora(file)[1]) == 24


def test_a_flipped_bit_in_a_file_of_torch_save_is_refused(tmp_path):
    path = write_release(tmp_path / "lora.pth", release_names(factors()))
    data = bytearray(path.read_bytes())
    value = factors()["transformer_blocks.3.attn.to_v.lora_B.weight"].numpy().tobytes()
    data[data.index(value) + 50] ^= 1
    (tmp_path / "flipped.pth").write_bytes(data)
    assert torch.load(tmp_path / "flipped.pth", weights_only=True)  # PyTorch does not look
    with pytest.raises(CheckpointError, match=r"flipped\.pth: damaged: Bad CRC-32 for file .*data/\d+"):
        load_lora(tmp_path / "flipped.pth")


def test_files_that_pytorch_was_told_to_write_without_sums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = write_release(tmp_path / "lora.pth", release_names(factors()))
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(load_lora(path)[1]) == 24


def test_repeated_and_sparse_tensors_are_no_factors(tmp_path):
    name = next(iter(release_names(factors())))
    for tensor in (torch.zeros(1, 1).expand(100_000, 1_000_000), torch.eye(3).to_sparse()):
        path = write_release(tmp_path / "lora.pth", release_names(factors()) | {name: tensor})
        with pytest.raises(CheckpointError, match=f"{name}: expected a tensor, found a Tensor"):
            load_lora(path)
