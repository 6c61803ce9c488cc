"""Whatever stops a conversion, its target is absent or complete."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.convert.sources.safetensors_stream import read_header, read_tensor
from seg4diff_jax.convert.staging import staged_directory
from tests.reference.checkpoints import make_checkpoint

PARTS = ["transformer", "vae", "text_encoder"]
CONVERTERS = """
import os, signal, sys
from seg4diff_jax.convert.checkpoint import convert_checkpoint

while True:
    source, target, to = (sys.stdin.readline().rstrip("\\n") for _ in range(3))
    if not source:
        break
    if (converter := os.fork()) == 0:
        while True:
            print("started", flush=True)
            convert_checkpoint(source, target, to=to, components=["transformer", "vae", "text_encoder"], overwrite=True)
    sys.stdin.readline()
    os.kill(converter, signal.SIGKILL)
    os.waitpid(converter, 0)
    print("killed", flush=True)
"""
"""For each source, target and format, a process that converts again and again, until a line says to kill it.

The processes are forks of one that has its imports done, which take longer than a conversion.
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("atomic") / "sd3", dtype=torch.float16, t5=False)


@pytest.fixture(scope="module")
def converters() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", CONVERTERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    ) as process:
        yield process
        process.kill()


def kill_while_converting(
    converters: subprocess.Popen[str], source: Path, target: Path, to: str, delay: float | None = None
) -> float:
    """Convert again and again, and `kill -9` so many seconds after the first conversion began, or the second.

    Returns the seconds from the beginning of the first to the kill.
    """
    assert converters.stdin is not None
    assert converters.stdout is not None
    converters.stdin.write(f"{source}\n{target}\n{to}\n")
    assert converters.stdout.readline() == "started\n"
    start = time.perf_counter()
    if delay is None:
        assert converters.stdout.readline() == "started\n"
    else:
        time.sleep(delay)
    converters.stdin.write("kill\n")
    seconds = time.perf_counter() - start
    while (said := converters.stdout.readline()) != "killed\n":
        assert said == "started\n"
    return seconds


@pytest.mark.parametrize("to", ["native", "diffusers"])
def test_kill_minus_nine_leaves_the_target_absent_or_complete(layout: Path, tmp_path: Path, to: str, converters):
    moments = random.Random(0)
    expected = {name: dict(open_source(layout).component(name).parameters()) for name in PARTS}
    duration = kill_while_converting(converters, layout, tmp_path / "first", to)
    open_source(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    for _ in range(5):
        kill_while_converting(converters, layout, tmp_path / "target", to, moments.uniform(0, 1.3 * duration))
        if (tmp_path / "target").exists():
            source = open_source(tmp_path / "target")
            for name, parameters in expected.items():
                found = dict(source.component(name).parameters())
                assert found.keys() == parameters.keys()
                assert all(np.array_equal(found[key], value) for key, value in parameters.items())
        for leftover in tmp_path.glob(".target*"):
            with pytest.raises(CheckpointError):
                open_source(leftover)
    convert_checkpoint(layout, tmp_path / "target", to=to, components=PARTS, overwrite=True)
    assert [path.name for path in tmp_path.glob(".target*")] == []
    open_source(tmp_path / "target")


def test_an_error_while_writing_leaves_nothing(layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(info, once):
        raise OSError(28, "No space left on device", "target")

    monkeypatch.setattr("seg4diff_jax.convert.sources.safetensors_stream.TensorInfo.read", full)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(layout, tmp_path / "target")
    assert not list(tmp_path.iterdir())


def test_a_replaced_target_is_the_old_one_until_the_new_one_is_complete(tmp_path: Path):
    target = tmp_path / "target"
    for text in ("old", "new"):
        with staged_directory(target) as work:
            (work / "file").write_text(text)
            assert not target.exists() if text == "old" else (target / "file").read_text() == "old"
        assert (target / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_two_conversions_to_one_target_do_not_mix(tmp_path: Path):
    with staged_directory(tmp_path / "target") as work:
        (work / "file").write_text("first")
        with (
            pytest.raises(CheckpointError, match="another process is writing it"),
            staged_directory(tmp_path / "target"),
        ):
            pass
    assert (tmp_path / "target" / "file").read_text() == "first"


def test_leftovers_of_an_interrupted_run_are_removed(tmp_path: Path):
    for name in (".target.partial", ".target.replaced"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_text("x")
    with staged_directory(tmp_path / "target") as work:
        assert not list(work.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_complete_but_not_yet_renamed_target_is_not_loadable(layout: Path, tmp_path: Path):
    convert_checkpoint(layout, tmp_path / "target", components=["vae"])
    (tmp_path / "target").rename(tmp_path / ".target.partial")
    with pytest.raises(CheckpointError, match="left by an interrupted conversion"):
        open_source(tmp_path / ".target.partial")


def test_every_tensor_is_in_the_file_that_the_header_says(layout: Path, tmp_path: Path):
    convert_checkpoint(layout, tmp_path / "back", to="diffusers", components=["vae"])
    assert json.loads((tmp_path / "back" / "model_index.json").read_text())["transformer"] == [None, None]
    theirs = read_header(layout / "vae" / "diffusion_pytorch_model.safetensors")
    ours = read_header(tmp_path / "back" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(read_tensor(ours[name]).tobytes() == read_tensor(info).tobytes() for name, info in theirs.items())
