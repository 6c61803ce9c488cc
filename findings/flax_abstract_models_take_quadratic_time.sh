#!/usr/bin/env bash
# nnx.eval_shape of a model, which makes no numbers, takes time that grows with the square of the number of its layers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import cProfile
import pstats

import flax
import jax
from flax import nnx


class Layers(nnx.Module):
    def __init__(self, count: int, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(count)])


def calls(count: int) -> int:
    """Of Python's functions, while an abstract model of that many layers is made: unlike seconds the same on any machine."""
    profile = cProfile.Profile()
    profile.enable()
    nnx.eval_shape(lambda: Layers(count, nnx.Rngs(0)))
    profile.disable()
    return pstats.Stats(profile).total_calls


print("flax", flax.__version__, "jax", jax.__version__)
calls(10)
few, many = calls(20), calls(160)
print("expected: 8 times the layers, about 8 times the work, since no number is drawn")
print(f"seen: {few} calls for 20 layers, {many} for 160: {many / few:.1f} times")
print("each key that Rngs gives asks a traced counter for .sharding, and the error that answers walks through the whole trace")
assert many / few > 12
EOF
