"""What is imported is installed: by the package alone for masks and pictures, by the extra that is named otherwise."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires

import pytest

from seg4diff_jax import extras
from seg4diff_jax.command_line import main
from tests.test_layout import ROOT, imported, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MODULES = dict(sources())
CORE_COMMANDS = ("segment", "segment_unsupervised", "generate", "clip_score", "analyze", "perturb", "reproduce")
CORE_COMMANDS = (*CORE_COMMANDS, "scenes", "compare", "memory", "class_prior")
ENTRIES = {
    "core": (
        *("__init__", "__main__", "pipeline", "checkpoints", "convert.__main__"),
        *(f"command_line.{name}" for name in CORE_COMMANDS),
    ),
    "evaluate": (
        *(f"command_line.{name}" for name in ("evaluate", "statistics", "perturbation")),
        *("data.tfds_source", "data.sets"),
    ),
    "train": ("command_line.train", "command_line.tasks", "command_line.reproduction"),
    "plan": ("command_line.plan", "command_line.plan_evaluate", "planning.plan"),
}
"""Extra to the modules that start what it is for."""
ASKED_FOR = {"torch", "diffusers", "accelerate", "gguf"}
"""Libraries that the package imports only where a user's file needs them; where they lack a sentence says so."""


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirements: list[str]) -> set[str]:
    """Distributions of requirements that no extra asks for."""
    return {normalised(re.match(r"[\w.-]+", each)[0]) for each in requirements if "extra ==" not in each}  # type: ignore[index]


def declared(extra: str) -> set[str]:
    """Distributions that the package alone (`core`) or an extra names, those of an extra within it included."""
    found = named(PROJECT["dependencies"])
    for each in PROJECT["optional-dependencies"].get(extra, ()):
        nested = re.fullmatch(r"seg4diff-jax\[(\w+)\]", each)
        found |= declared(nested[1]) if nested else named([each])
    return found


def installed_with(extra: str) -> set[str]:
    """The same, and those that these cannot do without."""
    found = declared(extra)
    return found.union(*(named(requires(each) or []) for each in found - {"libtpu"}))


def libraries(entries: tuple[str, ...]) -> dict[str, str]:
    """Distributions that the modules and all that these import need, to one module that needs each."""
    seen, left, found = set(), list(entries), {}
    distributions = packages_distributions()
    while left:
        module = left.pop()
        if module in seen or (module not in MODULES and f"{module}.__init__" not in MODULES):
            continue
        seen.add(module)
        tree = MODULES.get(module) or MODULES[f"{module}.__init__"]
        for name in (*imported(without_type_checking(tree)), *submodules(without_type_checking(tree))):
            if name.split(".")[0] == "seg4diff_jax":
                left.append(name.removeprefix("seg4diff_jax."))
            elif (library := name.split(".")[0]) not in sys.stdlib_module_names and library not in ASKED_FOR:
                (distribution, *_) = distributions[library]
                found.setdefault(normalised(distribution), module)
    return found


def submodules(tree: ast.Module) -> list[str]:
    """What `from package import module` may name, and the package itself names not."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}" for node in found for alias in node.names]
    return [name for name in names if name.removeprefix("seg4diff_jax.") in MODULES]


def without_type_checking(tree: ast.Module) -> ast.Module:
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    return ast.Module(kept, [])


def test_the_package_alone_has_at_most_twelve_direct_dependencies():
    assert len(PROJECT["dependencies"]) <= 12


@pytest.mark.parametrize("extra", ENTRIES)
def test_what_a_command_imports_comes_with_its_extra(extra):
    lacking = {name: module for name, module in libraries(ENTRIES[extra]).items() if name not in installed_with(extra)}
    assert not lacking


@pytest.mark.parametrize("extra", ["evaluate", "train"])
def test_an_extra_brings_nothing_that_its_commands_do_not_import(extra):
    own = {normalised(re.match(r"[\w.-]+", each)[0]) for each in PROJECT["optional-dependencies"][extra]}  # type: ignore[index]
    assert not own - {"seg4diff-jax"} - libraries(ENTRIES[extra]).keys()


@pytest.mark.parametrize(
    ("library", "extra", "command"),
    [
        ("jinja2", "evaluate", ["evaluate", "--data.size=8"]),
        ("grain", "train", ["train", "--config", "configs/magnet/miniature.yaml"]),
        ("grain", "plan", ["plan", "--config", "configs/magnet/miniature.yaml"]),
        ("optax", "train", ["train", "--config", "configs/magnet/miniature.yaml"]),
        ("diffusers", "convert", ["convert", "verify", "miniature"]),
    ],
)
def test_a_command_without_its_extra_says_what_to_install(library, extra, command, monkeypatch, capsys):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{library}'", name=library)

    monkeypatch.setattr("seg4diff_jax.command_line.import_module", absent)
    assert main(command) == (2 if extra == "plan" else 1), "of plan 1 is an answer"
    assert capsys.readouterr().err == (
        f"error: {library} is not installed: in the clone of seg4diff_jax type pip install -e '.[{extra}]'\n"
    )


def test_a_module_of_no_extra_that_is_missing_is_a_fault_of_ours(monkeypatch):
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'seg4diff_jax.nowhere'", name="seg4diff_jax.nowhere")

    monkeypatch.setattr("seg4diff_jax.command_line.import_module", absent)
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        main(["evaluate"])


@pytest.mark.parametrize(
    ("library", "extra"),
    [("tensorboardX", "train"), ("tensorflow_datasets", "evaluate"), ("torch", "convert"), ("numpy", None)],
)
def test_the_extra_of_a_library_is_the_first_that_brings_it(library, extra):
    assert extras.extra_of(library) == extra
