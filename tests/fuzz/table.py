"""Every reader of the project."""

from __future__ import annotations

from tests.fuzz.inputs import adapters, pictures, runs, shared_weights, weights
from tests.fuzz.reader import Reader

READERS: dict[str, Reader] = {
    **weights.READERS,
    **shared_weights.READERS,
    **adapters.READERS,
    **pictures.READERS,
    **runs.READERS,
}

CALLS = {
    "open", "read_text", "read_bytes", "read_json", "read_header", "read_tensor", "load", "load_file", "load_pickle",
    "safe_open", "safe_load", "restore", "from_pretrained", "from_file", "fromfile", "memmap", "ArrayRecordDataSource",
    "builder_from_directory", "parse_args", "read_image", "read_values", "read_stored", "read_classes", "open_source",
    "GGUFReader",
}  # fmt: skip
"""Names of functions that read files: where one is called, a reader is."""
ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(
        (
            "seg4diff_jax/analysis/clip.py",
            "seg4diff_jax/batching.py",
            "seg4diff_jax/command_line/analyze.py",
            "seg4diff_jax/command_line/segment.py",
            "seg4diff_jax/evaluation/benchmarks.py",
            "seg4diff_jax/evaluation/command.py",
            "seg4diff_jax/checkpoints.py",
            "seg4diff_jax/pipeline.py",
            "seg4diff_jax/planning/checkpoints.py",
            "seg4diff_jax/training/flow_matching.py",
            "seg4diff_jax/training/magnet.py",
            "seg4diff_jax/training/mask_items.py",
            "convert/load.py",
            "convert/readers.py",
            "convert/verify.py",
        ),
        "reads by what is fuzzed",
    ),
    **dict.fromkeys(
        ("seg4diff_jax/command_line/plan.py", "convert/command_line.py"), "options of the command line alone"
    ),
    **dict.fromkeys(
        ("seg4diff_jax/evaluation/results.py", "convert/verify_command.py"),
        "writes",
    ),
    "convert/comparison.py": "arrays of its own, of the same process",
    "convert/hub.py": "model_index.json of a download, as diffusers_folder reads it",
    "convert/torch_side.py": "PyTorch's own reading, of what ours has read before",
}
"""Modules that call such functions and are in no row, and why."""
