#!/usr/bin/env bash
# The cost analysis of a compiled JAX program counts the body of a scan once, however often it runs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import jax
import jax.numpy as jnp

print("jax", jax.__version__)
x, w = jnp.ones((128, 128)), jnp.ones((64, 128, 128))


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]


def unrolled(x, w):
    for layer in w:
        x = x @ layer
    return x


needed = 64 * 2 * 128**3
found = [jax.jit(f).lower(x, w).compile().cost_analysis()["flops"] / needed for f in (scanned, unrolled)]
print("expected: both have all of the 64 products' operations: 1.00 and 1.00 of them")
print(f"seen: {found[0]:.4f} scanned, {found[1]:.4f} unrolled")
assert abs(found[0] * 64 - 1) < 0.05 and abs(found[1] - 1) < 0.05
EOF
