"""Every reader of the project."""

from __future__ import annotations

from tests.fuzz.inputs import adapters, pictures, runs, scorers, shared_weights, weights
from tests.fuzz.reader import Reader

READERS: dict[str, Reader] = {
    **weights.READERS,
    **shared_weights.READERS,
    **scorers.READERS,
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
            "seg4diff_jax/analysis/word_views.py",
            "seg4diff_jax/batching.py",
            "seg4diff_jax/command_line/analyze.py",
            "seg4diff_jax/command_line/clip_score.py",
            "seg4diff_jax/command_line/generate.py",
            "seg4diff_jax/command_line/segment.py",
            "seg4diff_jax/command_line/statistics.py",
            "seg4diff_jax/evaluation/benchmarks.py",
            "seg4diff_jax/command_line/evaluate.py",
            "seg4diff_jax/checkpoints.py",
            "seg4diff_jax/pipeline.py",
            "seg4diff_jax/planning/checkpoints.py",
            "seg4diff_jax/reporting/drawings.py",
            "seg4diff_jax/reproduction/finetuning.py",
            "seg4diff_jax/reproduction/page.py",
            "seg4diff_jax/reproduction/perturbation.py",
            "seg4diff_jax/miniature/flow_matching.py",
            "seg4diff_jax/magnet/task.py",
            "seg4diff_jax/magnet/items.py",
            "convert/load.py",
            "convert/readers.py",
            "convert/verify/report.py",
        ),
        "reads by what is fuzzed",
    ),
    **dict.fromkeys(
        (
            "seg4diff_jax/command_line/plan.py",
            "seg4diff_jax/command_line/plan_evaluate.py",
            "convert/command_line/__init__.py",
        ),
        "options of the command line alone",
    ),
    **dict.fromkeys(
        ("seg4diff_jax/evaluation/results.py", "convert/command_line/verify.py"),
        "writes",
    ),
    "convert/verify/comparison.py": "arrays of its own, of the same process",
    "convert/sources/hub.py": "model_index.json of a download, as diffusers_folder reads it",
    "convert/verify/torch_side.py": "PyTorch's own reading, of what ours has read before",
}
"""Modules that call such functions and are in no row, and why."""
