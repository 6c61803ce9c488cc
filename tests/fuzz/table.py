"""Every reader of the project."""

from __future__ import annotations

from tests.fuzz.inputs import adapters, pictures, runs, weights
from tests.fuzz.reader import Reader

READERS: dict[str, Reader] = {**weights.READERS, **adapters.READERS, **pictures.READERS, **runs.READERS}

CALLS = {
    "open", "read_text", "read_bytes", "read_json", "read_header", "read_tensor", "load", "load_file", "load_pickle",
    "safe_open", "safe_load", "restore", "from_pretrained", "from_file", "fromfile", "memmap", "ArrayRecordDataSource",
    "builder_from_directory", "parse_args", "read_image", "read_values", "read_stored", "read_classes", "open_source",
    "GGUFReader",
}  # fmt: skip
"""Names of functions that read files: where one is called, a reader is."""
