"""What a file is follows from its first bytes, whatever it is called."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from flax.serialization import to_bytes
from safetensors.numpy import save

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.lora.adapters import load_lora
from seg4diff_jax.convert.sources.safetensors_stream import read_header
from seg4diff_jax.convert.sources.weight_files import read_weights
from tests.reference.weight_files import write_gguf

TENSORS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
SAFETENSORS = save(TENSORS)


def torch_saved(*, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def archived() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.safetensors", SAFETENSORS)
    return file.getvalue()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_gguf(path, "sd3", TENSORS, {"w": "F32"})
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.safetensors", "a.SAFETENSORS", "a.sft", "a.gguf", "a.GGUF", "a.bin", "a"])
def test_safetensors_and_gguf_are_read_under_any_name(tmp_path: Path, gguf: bytes, name: str):
    for contents in (SAFETENSORS, gguf):
        (tmp_path / name).write_bytes(contents)
        np.testing.assert_array_equal(read_weights(tmp_path / name)["w"].read(), TENSORS["w"])


PICKLED = "a file of torch.save: pickled files can run code"
OTHERS = {
    "torch.save": (torch_saved(zipped=True), PICKLED),
    "torch.save before 1.6": (torch_saved(zipped=False), PICKLED),
    "a zip": (archived(), "a zip archive: unpack it"),
    "ONNX": (b"\x08\x08\x12\x07pytorch" + bytes(200), "neither safetensors nor GGUF"),
    "Flax's msgpack": (to_bytes(TENSORS), "neither safetensors nor GGUF"),
    "nothing": (b"", "neither safetensors nor GGUF"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_called_what_they_are(tmp_path: Path, kind: str):
    contents, message = OTHERS[kind]
    (tmp_path / "a.xyz").write_bytes(contents)
    with pytest.raises(CheckpointError, match=rf"^\S*a\.xyz: {message}") as caught:
        read_weights(tmp_path / "a.xyz")
    assert ("pickle" in str(caught.value)) == kind.startswith("torch.save")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["torch.save", "torch.save before 1.6", "a zip"])
def test_a_suffix_does_not_make_safetensors_of_them(tmp_path: Path, kind: str):
    contents, message = OTHERS[kind]
    (tmp_path / "a.safetensors").write_bytes(contents)
    for read in (read_weights, read_header):
        with pytest.raises(CheckpointError, match=rf"^\S*a\.safetensors: {message}"):
            read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["lora.gguf", "lora.safetensors"])
def test_adapters_in_gguf_are_told_in_one_sentence(tmp_path: Path, gguf: bytes, name: str):
    (tmp_path / name).write_bytes(gguf)
    with pytest.raises(CheckpointError, match=rf"^\S*{name}: a GGUF file, and only safetensors is read here: "):
        load_lora(tmp_path / name)


def test_a_header_whose_length_begins_like_a_pickle_or_a_zip_is_read(tmp_path: Path):
    for begin in (0x80, int.from_bytes(b"PK", "little")):
        header = SAFETENSORS[8 : -TENSORS["w"].nbytes].ljust(begin)
        (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + TENSORS["w"].tobytes())
        np.testing.assert_array_equal(read_weights(tmp_path / "a")["w"].read(), TENSORS["w"])
