#!/usr/bin/env bash
# Flax's group norm loses the variance where the mean is large: in fp32, by its default.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 flax==0.12.8
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import flax
import jax
from flax import nnx

print("flax", flax.__version__)
x = 1000 + jax.random.normal(jax.random.key(0), (1, 64, 64, 32))


def deviation(**settings):
    return float(nnx.GroupNorm(32, num_groups=8, rngs=nnx.Rngs(0), **settings)(x).std())


found = deviation(), deviation(use_fast_variance=False)
print("expected: what is normalised has the standard deviation 1, for a mean of 1000 is small in fp32")
print(f"seen: {found[0]:.3f} by default, {found[1]:.3f} with use_fast_variance=False")
assert abs(found[0] - 1) > 0.1 and abs(found[1] - 1) < 0.01
EOF
