"""Imports point down, as CONTRIBUTING says: they are read from the sources, those inside functions too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARRAYS_ONLY = (
    *(
        "bilinear",
        "models",
        "flow",
        "segmentation",
        "passes",
        "sampling",
        "numerics",
        "parallel",
        "checksums",
        "checked",
    ),
    *(f"magnet.{name}" for name in ("losses", "matching", "objective", "targets")),
)
"""Parts that know no files, tokenizers, pictures or terminals."""
FOREIGN_TO_ARRAYS = {"PIL", "huggingface_hub", "io", "json", "os", "pathlib", "rich", "safetensors", "shutil", "sys"}
FOREIGN_TO_ARRAYS |= {"tempfile", "tokenizers", "torch", "transformers", "yaml"}

MAY_IMPORT: dict[str, str] = {
    # Arrays to arrays.
    "models": "checked parallel",
    "numerics": "",
    "checked": "",
    "flow": "numerics",
    "bilinear": "",
    "segmentation": "bilinear checked models quoting",
    "parallel": "",
    "checksums": "",
    "passes": "flow models parallel segmentation",
    "class_maps": "models passes segmentation",
    "sampling": "flow models",
    # What is around them, in memory.
    "terminal": "",
    "quoting": "",
    "versions": "",
    "extras": "",
    "image_files": "",
    "images": "bilinear image_files",
    "compilation": "",
    "configuration": "quoting",
    "processes": "parallel",
    "text": "models",
    "class_names": "",
    "batching": "flow images models",
    "class_grids": "class_maps models passes segmentation text",
    "pipeline_options": "checked flow images models segmentation",
    "prompt_attention": "models text",
    "prompt_cache": "models passes",
    "generated_masks": "batching class_names flow models parallel passes prompt_attention sampling segmentation text",
    "unnamed_segments": "batching models passes segmentation",
    "pipeline": "batching class_grids class_names flow generated_masks images models numerics parallel passes "
    "pipeline_options prompt_attention prompt_cache sampling segmentation text unnamed_segments",
    "class_priors": "batching class_grids convert images numerics pipeline pipeline_options quoting segmentation text",
    "reporting": "images pipeline prompt_attention segmentation",
    # Checkpoints and data, and what reads or writes them.
    "convert": "bilinear checksums extras flow models numerics passes quoting segmentation terminal text",
    "interrupted_runs": "convert quoting",
    "checkpoints": "batching compilation convert flow models numerics parallel pipeline text",
    "analysis": "convert flow images models numerics passes pipeline pipeline_options prompt_attention quoting "
    "reporting sampling text",
    "data": "convert image_files images quoting segmentation",
    # What is done with a model, each by itself.
    "training": "checked compilation configuration convert data flow image_files models numerics parallel passes "
    "quoting sampling segmentation terminal",
    "miniature": "analysis checked configuration convert data flow models parallel passes reporting segmentation text "
    "training",
    "magnet": "bilinear checked checkpoints convert data flow miniature models parallel passes segmentation text "
    "training",
    "planning": "checkpoints convert data evaluation magnet models numerics parallel passes prompt_cache segmentation "
    "training",
    "evaluation": "batching class_grids class_maps compilation configuration convert data flow images interrupted_runs "
    "miniature models numerics parallel passes pipeline processes quoting reporting segmentation text versions",
    "reproduction": "analysis checkpoints convert evaluation flow images interrupted_runs magnet models numerics "
    "passes pipeline reporting segmentation text training",
    # What people start.
    "command_line": "analysis batching checkpoints class_names class_priors compilation configuration convert data "
    "evaluation extras flow generated_masks images interrupted_runs magnet miniature models numerics parallel pipeline "
    "pipeline_options planning processes prompt_attention quoting reporting reproduction segmentation terminal text "
    "training versions",
    "__init__": "checkpoints class_names class_priors convert data image_files models parallel pipeline "
    "reporting segmentation",
    "__main__": "command_line",
}
"""Part to the parts that it may import besides itself."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module, named without `seg4diff_jax.`, and its syntax tree."""
    for package in ("seg4diff_jax", "convert"):
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removeprefix("seg4diff_jax.")
            if package == "convert" or not name.startswith("convert."):  # a link to the other
                yield name, ast.parse(file.read_text("utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of the modules that are imported anywhere in a file; `from package import module` names the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            whole = node.module == "seg4diff_jax"
            yield from (f"{node.module}.{alias.name}" if whole else str(node.module) for alias in node.names)


def part_of(module: str) -> str:
    return module.removeprefix("seg4diff_jax.").split(".")[0]


EDGES = {
    (name, part_of(module))
    for name, tree in sources()
    for module in imported(tree)
    if module.split(".")[0] == "seg4diff_jax" and part_of(module) != part_of(name)
}


def test_every_part_has_a_place_in_the_table():
    assert {part_of(name) for name, _ in sources()} == {*MAY_IMPORT}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_is_below_it(part):
    beyond = {edge for edge in EDGES if part_of(edge[0]) == part}
    beyond = {(name, other) for name, other in beyond if other not in MAY_IMPORT[part].split()}
    assert not beyond


def test_the_table_has_no_circles_and_names_nothing_that_is_not_needed():
    left = {part: set(below.split()) for part, below in MAY_IMPORT.items()}
    while bottom := {part for part, below in left.items() if not below}:
        left = {part: below - bottom for part, below in left.items() if part not in bottom}
    assert not left
    used = {(part_of(name), other) for name, other in EDGES}
    assert {(part, other) for part, below in MAY_IMPORT.items() for other in below.split()} == used


def test_what_computes_knows_no_files_tokenizers_or_terminals():
    found = {
        (name, module)
        for name, tree in sources()
        if part_of(name) in ARRAYS_ONLY or name in ARRAYS_ONLY
        for module in imported(tree)
        if module.split(".")[0] in FOREIGN_TO_ARRAYS
    }
    assert not found


def test_bars_of_progress_are_of_one_module():
    assert {name for name, tree in sources() if "rich.progress" in imported(tree)} == {"terminal"}


def test_what_plans_is_imported_by_its_commands_alone():
    assert {name for name, other in EDGES if other == "planning"} == {"command_line.plan", "command_line.plan_evaluate"}
