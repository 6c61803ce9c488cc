"""Recognises the format of a weight file by its first bytes: its suffix may be `.sft`, absent, or another format's."""

from __future__ import annotations

from typing import Literal

Container = Literal["safetensors", "gguf", "torch", "zip", "pointer"]
"""The kinds of files that are recognised.

`torch` is a file of torch.save: a zip with a pickle in it, formerly a bare pickle. `zip` is any other zip. `pointer` is
git-lfs's pointer to a file.
"""

HEAD = 512
"""Bytes that show the container: a zip of torch.save begins with its pickle, whose name lies in these bytes."""

SUFFIXES: dict[str, Container] = {".safetensors": "safetensors", ".sft": "safetensors", ".gguf": "gguf"}
"""Suffixes by which weight files are found in directories, and the container that a damaged file was meant to be."""


def container_of(head: bytes) -> Container | None:
    """Returns the container of a file from its first `HEAD` bytes; None if it is not known."""
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
"""For each container that is not read as safetensors: what the file is, and what to do."""
