"""Whatever the mesh, the same losses; and every parameter that is worth splitting is split."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seg4diff_jax.training.loop import MeshConfig, train
from tests.reference.mesh_layouts import losses
from tests.reference.small_training import OPTIMIZER, loss, make_run, make_task

ROOT = Path(__file__).parents[1]
LAYOUTS = ["8x1x1", "1x8x1", "1x1x8", "4x2x1", "4x1x2", "2x4x1", "2x1x4", "1x4x2", "1x2x4"]
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.mark.parametrize("layouts", [["2x2x2"], pytest.param(LAYOUTS, marks=pytest.mark.slow)], ids=["2x2x2", "all"])
def test_every_layout_of_eight_devices_gives_the_losses_of_one(tmp_path, layouts):
    expected = losses(tmp_path / "one", MeshConfig(1, 1, 1))
    assert len(set(expected)) == 4
    flags = f"--xla_force_host_platform_device_count=8 {QUICK_TO_COMPILE}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.reference.mesh_layouts", str(tmp_path), *layouts]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = {row["layout"]: row["losses"] for row in map(json.loads, done.stdout.splitlines())}
    assert list(found) == layouts
    for layout, values in found.items():
        np.testing.assert_allclose(values, expected, rtol=2e-5, err_msg=layout)


def test_two_processes_of_two_devices_share_a_run(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.reference.small_training", str(tmp_path / "two"), port]
    both = [
        subprocess.Popen([*command, str(number)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one = train(make_task(loss=loss), make_run(tmp_path / "one"), OPTIMIZER)
    found = np.frombuffer((tmp_path / "two" / "up.npy").read_bytes(), np.float32)
    np.testing.assert_allclose(found, np.asarray(one.up.kernel).ravel(), rtol=1e-4, atol=1e-6)
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 20


def test_a_mesh_that_does_not_fit_the_devices_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fsdp x tensor is 3 x 1 = 3, which does not divide the 1 devices"):
        train(make_task(), make_run(tmp_path, mesh=MeshConfig(fsdp=3)), OPTIMIZER)
