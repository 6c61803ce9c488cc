"""GGUF files of SD3 and T5 stand for the numbers that the `gguf` package makes of them, and damage is named."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from gguf.tensor_mapping import get_tensor_name_map

from seg4diff_jax.convert.components import parse_config
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.readers import ComponentReader
from seg4diff_jax.convert.sources import gguf as ours
from seg4diff_jax.convert.sources.gguf import BLOCKS, PLAIN, read_gguf
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.convert.sources.text_encoders import open_file
from tests.reference.weight_files import (
    CONFIGS,
    Arrays,
    kinds_in_turn,
    random_blocks,
    random_tensors,
    write_gguf,
    write_plain,
)

KINDS = ("Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q5_1", "F16", "F32", "BF16", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K")


@pytest.fixture(scope="module")
def transformer() -> Arrays:
    return random_tensors("transformer", "stability")


def assert_same_parameters(found: ComponentReader, expected: ComponentReader) -> None:
    found.check()
    theirs = dict(expected.parameters())
    assert theirs.keys() == found.layout().keys()
    for name, array in found.parameters():
        assert array.dtype == found.layout()[name][1]
        np.testing.assert_array_equal(array.astype(np.float32), theirs[name], err_msg=name)


@pytest.mark.parametrize("kind", [*BLOCKS, "F16", "F32", "BF16"])
def test_every_type_is_read_to_the_numbers_of_the_gguf_package(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ours, "STRIP", 1500)  # more than one strip, and rows left over
    quantisation = gguf.GGMLQuantizationType[kind]
    data = random_blocks((7, 512), quantisation)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "sd3")
    writer.add_tensor("first", np.zeros(3, np.float32))
    writer.add_tensor("weight", data, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    architecture, tensors = read_gguf(tmp_path / "a.gguf")
    assert architecture == "sd3"
    found = tensors["weight"].read()
    assert found.dtype == tensors["weight"].dtype == PLAIN.get(kind, np.float32)
    expected = dequantize(data, quantisation)
    assert found.shape == tensors["weight"].shape == expected.shape
    assert found.astype(np.float32).tobytes() == expected.tobytes()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_in_gguf_is_the_one_of_its_dequantised_numbers(tmp_path: Path, transformer: Arrays, prefix: str):
    named = {prefix + name: array for name, array in transformer.items()}
    meant = write_gguf(tmp_path / "sd3.gguf", "sd3", named, kinds_in_turn(named, KINDS))
    found = open_source(tmp_path / "sd3.gguf")
    assert list(found.configs) == ["transformer"]
    expected = parse_config("transformer", CONFIGS["transformer"])
    assert parse_config("transformer", found.configs["transformer"]) == expected
    plain = open_source(write_plain(tmp_path / "plain.safetensors", meant))
    assert_same_parameters(found.component("transformer"), plain.component("transformer"))


def test_a_positional_table_without_its_dimension_of_one_is_read(tmp_path: Path, transformer: Arrays):
    flat = {name: array[0] if name == "pos_embed" else array for name, array in transformer.items()}
    write_gguf(tmp_path / "sd3.gguf", "sd3", flat, dict.fromkeys(flat, "F32"))
    plain = open_source(write_plain(tmp_path / "plain.safetensors", transformer)).component("transformer")
    assert_same_parameters(open_source(tmp_path / "sd3.gguf").component("transformer"), plain)


def test_t5_in_gguf_has_llamas_names_and_is_the_one_of_its_dequantised_numbers(tmp_path: Path):
    plain = random_tensors("text_encoder_3", "stability")
    names = get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, CONFIGS["text_encoder_3"]["num_layers"])
    theirs = {name: f"{names.get_name(name.removesuffix('.weight'))}.weight" for name in plain}
    assert {*theirs.values()} == {*random_tensors("text_encoder_3", "gguf")}
    tensors = {theirs[name]: array for name, array in plain.items()}
    file = tmp_path / "t5-v1_1-xxl-encoder-Q8_0.gguf"
    meant = write_gguf(file, "t5encoder", tensors, kinds_in_turn(tensors, KINDS))
    write_plain(tmp_path / "t5xxl.safetensors", {name: meant[own] for name, own in theirs.items()})
    found, expected = (open_file(path) for path in (file, tmp_path / "t5xxl.safetensors"))
    parsed = [parse_config("text_encoder_3", source.configs["text_encoder_3"]) for source in (found, expected)]
    assert parsed == [parse_config("text_encoder_3", CONFIGS["text_encoder_3"])] * 2
    assert_same_parameters(found.component("text_encoder_3"), expected.component("text_encoder_3"))


def test_without_the_gguf_package_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch):
    write_gguf = gguf.GGUFWriter(tmp_path / "a.gguf", "sd3")
    write_gguf.add_tensor("w", np.zeros(32, np.float32))
    for write in (write_gguf.write_header_to_file, write_gguf.write_kv_data_to_file, write_gguf.write_tensors_to_file):
        write()
    write_gguf.close()
    for cached in (ours._quantisations, ours._type_names):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(CheckpointError, match="GGUF files need the package gguf: pip install gguf"):
        read_gguf(tmp_path / "a.gguf")


def test_a_gguf_of_another_architecture_is_named(tmp_path: Path, transformer: Arrays):
    write_gguf(tmp_path / "flux.gguf", "flux", transformer, dict.fromkeys(transformer, "F16"))
    with pytest.raises(CheckpointError, match=r"flux\.gguf: a GGUF file of the architecture 'flux'; expected sd3"):
        open_source(tmp_path / "flux.gguf")


# ---- damage ---------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, keys: bytes = b"", key_count: int = 0, tensors: bytes = b"", count: int = 1, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, key_count) + keys + tensors


def tensor(name: str = "w", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


DATA = bytes(256)
KEY = text("k") + struct.pack("<II", 4, 7)
DAMAGED = {
    "another file": (b"<html><body>404</body></html>", "not a GGUF file"),
    "empty": (b"", "truncated or damaged"),
    "version": (header(version=99), "GGUF version 99 is not read"),
    "big-endian": (header(version=3 << 24), r"version 50331648 \(big-endian\) is not read"),
    "count of tensors": (header(count=1 << 60), f"corrupt header: {1 << 60} tensors; expected at most"),
    "count of keys": (header(key_count=1 << 60), f"{1 << 60} keys; expected at most"),
    "length of a name": (header(tensors=struct.pack("<Q", 1 << 63)), "bytes in a string; expected at most"),
    "length of an array": (
        header(keys=text("k") + struct.pack("<IIQ", 9, 0, 1 << 40), key_count=1),
        "entries in an array; expected at most",
    ),
    "array of arrays": (header(keys=text("k") + struct.pack("<IIQ", 9, 9, 1), key_count=1), "an array of the unknown"),
    "type of a key": (header(keys=text("k") + struct.pack("<I", 77), key_count=1), "has the unknown type 77"),
    "a key twice": (header(keys=KEY + KEY, key_count=2), "the key k occurs twice"),
    "a name that is no text": (header(tensors=struct.pack("<Q", 2) + b"\xff\xfe"), "is no text"),
    "a tensor twice": (header(tensors=tensor() + tensor(offset=128), count=2) + DATA, "w occurs twice"),
    "alignment": (
        header(keys=text("general.alignment") + struct.pack("<II", 4, 3), key_count=1, tensors=tensor()) + DATA,
        "general.alignment is 3; expected a power of two",
    ),
    "rank": (header(tensors=tensor(shape=(1,) * 9)), "9 dimensions of w; expected at most 4"),
    "overflow": (header(tensors=tensor(shape=(1 << 63, 1 << 63))) + DATA, "corrupt header: w has the shape"),
    "rows of no whole blocks": (header(tensors=tensor(shape=(33,), kind=8)) + DATA, "Q8_0 are whole blocks of 32"),
    "unknown type": (header(tensors=tensor(kind=9999)) + DATA, "w is type 9999, which is not read; fetch a file of"),
    "type that is not read": (header(tensors=tensor(shape=(256,), kind=16)) + DATA, "w is IQ2_XXS, which is not read"),
    "an offset beyond": (header(tensors=tensor(offset=1 << 40)) + DATA, f"w begins at {1 << 40}; expected 0"),
    "an offset amid another": (
        header(tensors=tensor() + tensor("v", offset=64), count=2) + DATA,
        "v begins at 64; exp",
    ),
    "truncated": (header(tensors=tensor()) + bytes(100), r"truncated: w \(F32 \[32\]\) ends at"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_answered_at_once_in_one_sentence_that_names_the_file(tmp_path: Path, damage: str):
    data, message = DAMAGED[damage]
    (tmp_path / "sd3.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"^\S*sd3\.gguf: .*{message}") as caught:
        read_gguf(tmp_path / "sd3.gguf")
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, transformer: Arrays):
    few = dict(list(transformer.items())[:3])
    write_gguf(tmp_path / "whole.gguf", "sd3", few, dict.fromkeys(few, "F32"))
    whole = (tmp_path / "whole.gguf").read_bytes()
    end = max(t.offset + 4 * int(np.prod(t.shape)) for t in read_gguf(tmp_path / "whole.gguf")[1].values())
    for size in [*range(0, 600, 7), end - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: (truncated|corrupt|not a GGUF)"):
            read_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize("more", [1, 31, 32, 33, 1000])
def test_a_file_longer_than_its_header_describes_is_refused(tmp_path: Path, more: int):
    """But for what fills the last tensor up to the alignment: writers leave it out, or not."""
    head = header(tensors=tensor(shape=(33,)))
    head += bytes(-len(head) % 32)
    for filled in (0, 28):
        (tmp_path / "whole.gguf").write_bytes(head + bytes(33 * 4 + filled))
        assert read_gguf(tmp_path / "whole.gguf")[1]["w"].shape == (33,)
        (tmp_path / "long.gguf").write_bytes(head + bytes(33 * 4 + filled + more))
        with pytest.raises(CheckpointError, match=r"long\.gguf: too long: its header describes"):
            read_gguf(tmp_path / "long.gguf")


def test_integers_are_no_weights_in_gguf_either(tmp_path: Path, transformer: Arrays):
    named = {n: a.astype(np.int8) if n == "final_layer.linear.weight" else a for n, a in transformer.items()}
    kinds = {name: "I8" if array.dtype == np.int8 else "F32" for name, array in named.items()}
    writer = gguf.GGUFWriter(tmp_path / "sd3.gguf", "sd3")
    for name, array in named.items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kinds[name]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"only floating-point .* final_layer\.linear\.weight \[64, 256\] int8"):
        open_source(tmp_path / "sd3.gguf").component("transformer").check()
