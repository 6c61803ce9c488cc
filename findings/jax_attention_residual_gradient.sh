#!/usr/bin/env bash
# The log-sum-exp that jax.nn.dot_product_attention returns has a gradient of zero.
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
q, k, v = (jax.random.normal(jax.random.key(seed), (1, 4, 1, 8)) for seed in range(3))


def returned(q):
    return jax.nn.dot_product_attention(q, k, v, return_residual=True)[1].sum()


def written_out(q):
    return jax.nn.logsumexp(jnp.einsum("btnh,bsnh->bnts", q, k) / 8**0.5, axis=-1).sum()


values = float(returned(q)), float(written_out(q))
gradients = [float(jnp.abs(jax.grad(f)(q)).max()) for f in (returned, written_out)]
print("expected: values and gradients of both are equal")
print(f"seen: values {values[0]:.5f} and {values[1]:.5f}, largest gradients {gradients[0]:.5f} and {gradients[1]:.5f}")
assert abs(values[0] - values[1]) < 1e-4
assert gradients[0] == 0 < 0.1 < gradients[1]
EOF
