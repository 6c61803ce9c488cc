"""Safetensors files are read and written by offset: the `safetensors` library is the reference both ways."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.layout import checksum, contiguous, dtype_named
from seg4diff_jax.convert.sources.safetensors_stream import read_header, read_tensor, write_safetensors

TORCH_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}.{n}": (torch.randn(shape, generator=generator) * 50).to(dtype)
        for dtype in TORCH_DTYPES
        for n, shape in enumerate([(3, 5), (7,), (), (2, 0, 3)])
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def rewrite_header(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def change_entry(path: Path, name: str, **changes) -> None:
    def change(header: bytes) -> bytes:
        entries = json.loads(header)
        entries[name] |= changes
        return json.dumps(entries).encode()

    rewrite_header(path, change)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_and_shape_is_read_as_the_library_reads_it(file: Path):
    expected = load_file(file)
    header = read_header(file)
    assert header.keys() == expected.keys()
    for name, info in header.items():
        ours = read_tensor(info)
        assert ours.shape == tuple(expected[name].shape)
        assert str(ours.dtype) == str(expected[name].dtype).removeprefix("torch.")
        assert ours.tobytes() == as_bytes(expected[name])


def test_a_written_file_is_read_back_by_the_library(file: Path, tmp_path: Path):
    header = read_header(file)
    layout = {name: (info.shape, info.dtype) for name, info in header.items()}
    copy = tmp_path / "copy.safetensors"
    write_safetensors(copy, layout, ((name, read_tensor(info)) for name, info in header.items()))
    expected, found = load_file(file), load_file(copy)
    assert list(read_header(copy)) == list(header)
    assert all(as_bytes(found[name]) == as_bytes(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("a", np.zeros(2, np.float32))], "b was announced and not written"),
        ([("b", np.zeros(2, np.float32))], "expected .*a.*got b"),
        ([("a", np.zeros(3, np.float32))], "expected"),
        ([("a", np.zeros(2, np.float16))], "expected"),
    ],
)
def test_tensors_that_differ_from_the_announced_layout_are_not_written(tmp_path: Path, given, message: str):
    layout = {name: ((2,), np.dtype(np.float32)) for name in "ab"}
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "x.safetensors", layout, given)


def test_a_truncated_file_is_named_with_both_sizes(file: Path):
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 5)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: truncated: .*{size} bytes.*{size - 5}"):
        read_header(file)


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_a_file_cut_inside_its_header_is_called_truncated(file: Path, size: int):
    with file.open("r+b") as opened:
        opened.truncate(size)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (truncated|corrupt)"):
        read_header(file)


def test_bytes_after_the_last_tensor_are_refused(file: Path):
    with file.open("ab") as opened:
        opened.write(b"more")
    with pytest.raises(CheckpointError, match="too long"):
        read_header(file)


def test_a_page_of_html_is_not_a_safetensors_file(tmp_path: Path):
    page = tmp_path / "page.safetensors"
    page.write_text("<html><body>404: the file that you wanted is not here</body></html>")
    with pytest.raises(CheckpointError, match=r"page\.safetensors: truncated, or not a safetensors file"):
        read_header(page)


def test_an_absent_file_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        read_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "Q4"}, "needs a dtype"),
        ({"shape": [-3, 5]}, "has the shape"),
        ({"shape": [3, 6]}, "should take 72 bytes"),
        ({"data_offsets": [0, 4]}, "should take"),
        ({"data_offsets": [1]}, "two data_offsets"),
        ({"shape": "long"}, "has the shape"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused_with_the_tensor(file: Path, changes: dict, message: str):
    change_entry(file, "torch.float32.0", **changes)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: corrupt header: .*{message}"):
        read_header(file)


def test_a_header_that_is_not_json_is_refused(file: Path):
    rewrite_header(file, lambda header: header.replace(b":", b";", 1))
    with pytest.raises(CheckpointError, match="corrupt header"):
        read_header(file)


def test_a_name_that_occurs_twice_is_refused(file: Path):
    rewrite_header(file, lambda header: header.replace(b"torch.int8.0", b"torch.int8.1"))
    with pytest.raises(CheckpointError, match=r"'torch\.int8\.1' occurs twice"):
        read_header(file)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(file: Path):
    info = read_header(file)["torch.float64.0"]
    with file.open("r+b") as opened:
        opened.truncate(info.offset + 8)
    with pytest.raises(CheckpointError, match=rf"expected {info.nbytes} bytes .* found 8"):
        read_tensor(info)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(37, 53), (1, 40), (40, 1), (0, 4), (5,), (), (3, 3, 4, 5)])
def test_contiguous_copies_equal_numpys(shape: tuple[int, ...], dtype):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for view in (array, array.T, array[::-1] if array.ndim else array):
        ours = contiguous(view, np.dtype(dtype))
        assert ours.flags.c_contiguous
        assert ours.shape == view.shape
        np.testing.assert_array_equal(ours, view.astype(dtype))


def test_checksums_tell_bytes_apart_and_dtypes_keep_their_names():
    array = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16)
    assert checksum(array) == checksum(array.copy())
    assert checksum(array) != checksum(-array)
    assert all(dtype_named(str(dtype)) == dtype for dtype in (array.dtype, np.dtype(np.float16), np.dtype(np.int8)))


def corrupt(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


ABSURD = {
    "metadata that is no table": (b'{"__metadata__": [1]}', "expected an object of strings as __metadata__"),
    "metadata of numbers": (b'{"__metadata__": {"a": 1}}', "expected an object of strings as __metadata__"),
    "depth without end": (b"[" * 200_000, "corrupt header: "),
    "a number of thousands of digits": (entry().replace(b"[1]", b"[" + b"9" * 5000 + b"]"), "corrupt header: "),
    "a number of hundreds of digits": (
        entry().replace(b"[1]", b"[" + b"9" * 400 + b"]"),
        "not JSON: a number of 400 digits",
    ),
    "a truth value as a size": (entry(shape=[True]), "a has the shape or offsets"),
    "thousands of dimensions": (entry(shape=[1] * 5000), "a has the shape or offsets"),
    "an empty tensor beyond all memory": (entry(shape=[0, 1 << 62, 1 << 62], offsets=[0, 0]), "a has the shape or off"),
    "not a number": (entry().replace(b"[1]", b"[NaN]"), "not JSON: NaN is no number"),
    "an entry that is a number": (b'{"a": 7}', "a needs a dtype of"),
    "a dtype that is a list": (entry(dtype=["F32"]), "a needs a dtype of"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_an_absurd_header_is_answered_at_once_with_the_file(tmp_path: Path, case: str):
    header, message = ABSURD[case]
    with pytest.raises(CheckpointError, match=rf"^\S*x\.safetensors: corrupt header: .*{message.split(': ')[-1]}"):
        read_header(corrupt(tmp_path / "x.safetensors", header, bytes(4)))


def test_a_header_of_absurd_size_is_not_read(tmp_path: Path):
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write((1 << 36).to_bytes(8, "little"))
        file.truncate(1 << 37)  # a sparse file
    with pytest.raises(CheckpointError, match=r"x\.safetensors: truncated, or not a safetensors file"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("dtype", "what"),
    [
        ("F4", "weights of 4 or 6 bits"),
        ("F6_E2M3", "weights of 4 or 6 bits"),
        ("F6_E3M2", "weights of 4 or 6 bits"),
        ("F8_E4M3FNUZ", "8-bit floats of AMD's kind"),
        ("F8_E5M2FNUZ", "8-bit floats of AMD's kind"),
        ("C64", "complex numbers"),
    ],
)
def test_dtypes_that_are_not_read_are_named(tmp_path: Path, dtype: str, what: str):
    with pytest.raises(CheckpointError, match=rf"a is {dtype}: {what}.* are not read; fetch the same"):
        read_header(corrupt(tmp_path / "x.safetensors", entry(dtype=dtype)))


def test_a_directory_in_a_files_place_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="expected a file, found a directory"):
        read_header(tmp_path)
