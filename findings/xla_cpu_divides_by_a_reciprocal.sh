#!/usr/bin/env bash
# XLA's CPU backend divides an array by one number by multiplying it with the number's rounded reciprocal: a third of
# the quotients are another float than IEEE's, and the largest value of an array over itself need not be 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
draw = np.random.default_rng(0)
x = draw.random(100_000).astype(np.float32)
divisor = np.float32(0.7123)
quotients = np.asarray(jax.jit(lambda x, s: x / s)(x, divisor))
others = float((quotients != x / divisor).mean())
reciprocal = float((quotients != x * (np.float32(1) / divisor)).mean())

rows = draw.random((1000, 50)).astype(np.float32)
largest = np.array([jax.jit(lambda row: (row / row.max()).max())(row) for row in rows])
apart = np.asarray(jax.jit(lambda row, s: row / jax.lax.optimization_barrier(jnp.broadcast_to(s, row.shape)))(x, divisor))

print("expected: the float that is nearest to each quotient, as NumPy, PyTorch and IEEE 754 have it; a maximum of 1")
print(f"seen: {100 * others:.0f} % are another float, {100 * reciprocal:.0f} % differ from x * (1 / s)")
print(f"seen: of 1000 arrays that are divided by their maximum, in {(largest != 1).sum()} the largest value is not 1")
print(f"seen: behind an optimization barrier {100 * (apart != x / divisor).mean():.0f} % are another float")
assert 0.3 < others < 0.45 and reciprocal == 0
assert 50 < (largest != 1).sum() < 300
assert (apart == x / divisor).all()
EOF
