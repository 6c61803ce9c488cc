"""Compiled programs are kept between processes where the user says; a clock tells compiling from running."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import seg4diff_jax as s4d
from seg4diff_jax.compilation import CompilationClock, keep_compiled_programs

ROOT = Path(__file__).parents[1]


@pytest.fixture
def configured(monkeypatch, tmp_path) -> Iterator[dict]:
    """JAX's settings as at a fresh start, with the user's cache in `tmp_path`; put back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield before
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("configured")
def test_loading_keeps_programs_in_the_users_cache(tmp_path, sd3_checkpoint):
    s4d.load(sd3_checkpoint, blocks=1)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "seg4diff-jax" / "compiled")


@pytest.mark.usefixtures("configured")
def test_a_place_that_jax_was_told_is_kept():
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"


@pytest.mark.usefixtures("configured")
def test_no_place_is_named_when_nothing_is_to_be_kept():
    jax.config.update("jax_enable_compilation_cache", False)
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None


def _homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.usefixtures("configured")
def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", _homeless)
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None


AFTER_OTHER_PROGRAMS = """
import jax, jax.numpy as jnp
from seg4diff_jax.compilation import keep_compiled_programs

jax.jit(lambda x: x + 1)(1.0)
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jnp.sin(x) * 2)(1.0)
"""


@pytest.mark.parametrize("keep", [True, False])
def test_programs_are_kept_though_others_were_compiled_before(tmp_path, keep):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | {
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "JAX_ENABLE_COMPILATION_CACHE": str(keep).lower(),
    }
    command = [sys.executable, "-c", AFTER_OTHER_PROGRAMS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert any(path.is_file() for path in tmp_path.rglob("*")) == keep


def test_the_clock_counts_compilation_once_and_running_not_at_all():
    function = jax.jit(lambda x: jnp.sin(jnp.linalg.inv(x)))
    with CompilationClock() as first:
        function(jnp.eye(3)).block_until_ready()
    with CompilationClock() as second:
        function(jnp.eye(3)).block_until_ready()
    assert first.seconds > 10 * second.seconds
    clock = CompilationClock()
    clock._spans = [(5.0, 9.0), (6.0, 7.0), (8.0, 10.0), (20.0, 21.0)]
    assert clock.seconds == pytest.approx(6.0)
