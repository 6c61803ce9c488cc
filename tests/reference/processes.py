"""Modules of the tests in processes of their own: on simulated devices, and several that are one run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # Newer ones end where they meet a flag that is gone.
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
IN_ONE_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
"""Simulated devices of a process come to their collectives in one order: otherwise some wait in one and some in the
next, until XLA gives them up."""
COORDINATOR = "JAX_COORDINATOR_ADDRESS"


def flags(*more: str) -> dict[str, str]:
    """XLA_FLAGS for a process: those that this one was given, such as the instructions to use, and more."""
    return {"XLA_FLAGS": " ".join(filter(None, (os.environ.get("XLA_FLAGS"), *more)))}


def as_users_compile() -> dict[str, str]:
    """XLA_FLAGS without what makes compiling quick: for programs with much to compute, and for other compilers."""
    return {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace(QUICK_TO_COMPILE, "")}


def start(
    module: str, *command: str, devices: int = 1, compiled: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    """`tests.reference.MODULE` with a number of simulated devices. `compiled`: where programs are kept for the next."""
    simulated = flags(f"--xla_force_host_platform_device_count={devices}", QUICK_TO_COMPILE, IN_ONE_ORDER)
    variables = os.environ | {"JAX_PLATFORMS": "cpu"} | simulated | environment
    if compiled is not None:
        kept = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_ENABLE_COMPILATION_CACHE": "true"}
        variables |= kept | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.reference.{module}", *command],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(
    module: str, *command: str, devices: int, compiled: Path | None = None
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """The same command in two processes of as many devices each, told how to find each other on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = {COORDINATOR: f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    each = lambda number: joined | {"JAX_PROCESS_ID": str(number)}
    first, second = (start(module, *command, devices=devices, compiled=compiled, **each(n)) for n in range(2))
    return first, second


def one_of_several() -> bool:
    return COORDINATOR in os.environ


def finish(*processes: subprocess.Popen[str], code: int = 0, seconds: float = 600) -> list[str]:
    """Standard output of processes that end with this exit status. Raises AssertionError with what went wrong."""
    said = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=seconds)
            assert process.returncode == code, errors[-6000:]
            said.append(output)
    finally:
        for process in processes:
            process.kill()  # which does nothing to one that has ended
    return said
