#!/usr/bin/env bash
# The state that nnx.split and nnx.state return is no snapshot: it changes as the model is trained.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 flax==0.12.8 optax==0.2.8
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx

print("flax", flax.__version__)
model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
graph, state = nnx.split(model)
copied = nnx.state(nnx.clone(model))
before = jnp.array(model.kernel[...])
optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
moved = [float(jnp.abs(each["kernel"][...] - before).max()) for each in (state, copied)]
print("expected: what was split off before a step still holds the weights from before it: 0.0")
print(f"seen: after a step of 1.0 it has moved by {moved[0]}; a clone's by {moved[1]}")
assert moved == [1.0, 0.0]
EOF
