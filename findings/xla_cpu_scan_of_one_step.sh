#!/usr/bin/env bash
# Among jax.lax.scans over parts of stacked layers that run one after the other, one of a single step doubles the
# program's memory on XLA's CPU backend: it is no loop any more, and shares its copy of a layer with no loop's body.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import jax
import jax.numpy as jnp

print("jax", jax.__version__)
LAYERS, WIDTH = 12, 1024
layer_bytes = 4 * WIDTH**2


def part(x, stack, first, last):
    def step(x, row):
        layer = jax.lax.dynamic_index_in_dim(stack, row, keepdims=False)  # a slice before the loop would copy more
        return jnp.tanh(x @ layer), None

    return jax.lax.scan(step, x, jnp.arange(first, last))[0]


def temporaries(cuts):
    def run(x, stack):
        for first, last in zip(cuts, cuts[1:]):
            x = part(x, stack, first, last)
        return x

    shapes = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32), jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
    return jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / layer_bytes


cuts = {"one scan of 12": (0, 12), "scans of 4, 4, 4": (0, 4, 8, 12), "scans of 4, 1, 7": (0, 4, 5, 12)}
cuts["scans of 4, 1, 1, 6"] = (0, 4, 5, 6, 12)
found = {name: temporaries(each) for name, each in cuts.items()}
print("expected: the same memory for all, about one layer's parameters, since a loop has ended before the next begins")
print("seen, in layers' parameters: " + "; ".join(f"{name} {value:.2f}" for name, value in found.items()))
assert [round(value) for value in found.values()] == [1, 1, 2, 3]
EOF
