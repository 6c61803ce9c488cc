"""Every test runs on the CPU in fp32, with shapes in signatures checked at each call."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook(["seg4diff_jax", "convert"], "beartype.beartype")
