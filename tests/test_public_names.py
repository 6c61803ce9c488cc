"""What `seg4diff_jax` offers is listed, and costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import seg4diff_jax


def test_the_public_names_are_listed_before_anything_is_loaded():
    program = "import seg4diff_jax, sys; print(*dir(seg4diff_jax)); print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    names, loaded = done.stdout.splitlines()
    assert names.split() == sorted(seg4diff_jax.__all__)
    assert {"load", "open", "Pipeline", "Segmentation", "AttentionRequest", "ImageError"} < {*names.split()}
    assert loaded == "False"
    assert all(getattr(seg4diff_jax, name) is not None for name in dir(seg4diff_jax))
