"""What a file is by its first bytes, since suffixes say anything: `.sft`, none, or another format's."""

from __future__ import annotations

from typing import Literal

Container = Literal["safetensors", "gguf", "torch", "zip", "pointer"]
"""`torch`: of torch.save, a zip with a pickle in it, formerly a bare pickle. `zip`: any other. `pointer`: git-lfs'."""

HEAD = 512
"""Bytes from which containers are told: a zip of torch.save begins with its pickle, whose name lies here."""

SUFFIXES: dict[str, Container] = {".safetensors": "safetensors", ".sft": "safetensors", ".gguf": "gguf"}
"""By which files of weights are found in directories, and what damaged ones were meant to be."""


def container_of(head: bytes) -> Container | None:
    """The container of a file with these first `HEAD` bytes; None for all others."""
    if head[8:9] == b"{":  # after the header's length, which may begin with any byte
        return "safetensors"
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"PK"):
        return "torch" if b"data.pkl" in head else "zip"
    if head.startswith(b"version https://git-lfs"):
        return "pointer"
    return "torch" if head.startswith(b"\x80") else None


NO_SAFETENSORS: dict[Container | None, str] = {
    "torch": "a file of torch.save: pickled files can run code and are not read; convert it with "
    "safetensors.torch.save_file first",
    "zip": "a zip archive: unpack it, and give the .safetensors or .gguf file that it holds",
    "pointer": "a git-lfs pointer, a few lines in the place of the file: fetch the file with `git lfs pull`, or with "
    "`hf download`",
    "gguf": "a GGUF file, and only safetensors is read here: fetch the weights as safetensors",
}
"""What a file is that is no safetensors file, and what to do."""
