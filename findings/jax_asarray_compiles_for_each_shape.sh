#!/usr/bin/env bash
# jnp.asarray of a NumPy array compiles a program for each new shape; jax.device_put compiles none.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
compiled = 0


def listen(event, seconds, **_):
    global compiled
    compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(listen)
arrays = [np.ones((3, size), np.float32) for size in range(1, 41)]  # as many as a small checkpoint has shapes
seen = {}
print("expected: a NumPy array goes to the device as it is, so no program is compiled for it")
for name, move in {"jax.device_put": jax.device_put, "jnp.asarray": jnp.asarray, "jnp.array": jnp.array}.items():
    before = compiled
    moved = [move(array) for array in arrays]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(moved, arrays))
    seen[name] = compiled - before
    print(f"seen: {name} of arrays of {len(arrays)} shapes compiles {seen[name]} programs")
assert seen["jax.device_put"] == 0
assert seen["jnp.asarray"] == len(arrays)
EOF
