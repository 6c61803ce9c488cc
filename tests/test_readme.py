"""README's commands and the Python in README and docs/ run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import seg4diff_jax
from tests.reference.documents import DOCUMENTS, ROOT, blocks
from tests.reference.processes import as_users_compile

LOAD_ONCE = cache(seg4diff_jax.load)
WITHOUT_TORCH = """
import runpy, shlex, sys
sys.modules["torch"] = None
from seg4diff_jax.__main__ import main
for line in {commands!r}:
    program, *arguments = shlex.split(line)
    if program == "python":
        sys.argv = arguments
        runpy.run_path({root!r} + "/" + arguments[0], run_name="__main__")
    elif program == "seg4diff":
        assert main(arguments) == 0, line
    else:
        raise SystemExit("cannot run " + line)
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """README's commands that need nothing but the package, run in an empty directory and without PyTorch."""
    directory = tmp_path_factory.mktemp("quickstart")
    (install, *main_job), _, picture, *_ = (block.splitlines() for block in blocks("README.md", "bash"))
    assert install == 'pip install -e ".[evaluate]"'
    places = {"XDG_CACHE_HOME": str(directory / "cache"), "PYTHONPATH": str(ROOT)}
    environment = os.environ | as_users_compile() | places
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        environment.pop(name, None)
    program = WITHOUT_TORCH.format(commands=[*picture, *main_job], root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PyTorch" not in done.stderr
    return directory


def test_the_quickstart_makes_masks_and_keeps_compiled_programs(quickstart):
    labels = np.asarray(Image.open(quickstart / "runs" / "masks" / "labels.png"))
    assert labels.shape == (64, 64)
    assert len(np.unique(labels)) > 1
    assert any((quickstart / "cache" / "seg4diff-jax" / "compiled").iterdir())


def test_the_main_job_prints_the_scores_that_readme_shows(quickstart):
    (results,) = (quickstart / "runs" / "evaluate").glob("*/results.json")
    rows = json.loads(results.read_text())["rows"]
    assert [row["images"] for row in rows] == [500] * 3
    shown = re.search(r"\|\s*block \d+[^|]*\|\s*([\d.]+)", (ROOT / "README.md").read_text("utf-8"))
    assert shown is not None
    assert np.mean([row["miou"] for row in rows]) == pytest.approx(float(shown[1]), abs=0.3)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if blocks(name, "python")])
def test_the_python_examples_run(document, quickstart, monkeypatch):
    monkeypatch.chdir(quickstart)
    monkeypatch.setattr(seg4diff_jax, "load", LOAD_ONCE)
    exec(compile("\n".join(blocks(document, "python")), document, "exec"), {"__name__": "example"})


def test_the_files_that_documents_name_exist():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text("utf-8")
        named = re.findall(r"(?:tests|docs|examples|benchmarks|seg4diff_jax|convert)/[\w./]+\.(?:py|md)", text)
        missing = [name for name in named if not (ROOT / name).is_file()]
        assert not missing, f"{document} names {missing}"
