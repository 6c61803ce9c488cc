#!/usr/bin/env bash
# XLA's partitioner exchanges rows of a product on a 2 x 2 x 2 mesh of CPU devices, without a word.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2
cd "$work"
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$work/venv/bin/python" - <<'EOF'
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

print("jax", jax.__version__)
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
rows = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
x = np.arange(4 * 4 * 8, dtype=np.float32).reshape(4, 4, 8)
w = np.eye(8, dtype=np.float32)
multiply = jax.jit(lambda x, w: jax.lax.with_sharding_constraint(x @ w, rows))
placed = jax.device_put(x, rows), jax.device_put(w, NamedSharding(mesh, P("tensor", "fsdp")))
y = np.asarray(multiply(*placed))
origin = [next((j for j in range(4) if np.array_equal(y[i], x[j])), None) for i in range(4)]
print("expected: x @ identity is x: row i of the batch is row i, whatever the sharding: [0, 1, 2, 3]")
print(f"seen: {origin}")
assert origin == [0, 2, 1, 3]
EOF
