#!/usr/bin/env bash
# The arrays of a module that nnx.merge or nnx.clone has made outlive it, until Python's collector happens to run.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import gc
import weakref

import flax
import jax
from flax import nnx

print("flax", flax.__version__, "jax", jax.__version__)
SIDE = 1000


def constructed():
    return nnx.Linear(SIDE, SIDE, use_bias=False, rngs=nnx.Rngs(0))


def merged():  # as checkpoints are loaded: an abstract module, filled and merged
    graph, state = nnx.split(constructed())
    return nnx.merge(graph, state)


def cloned():
    return nnx.clone(constructed())


def live():
    return sum(array.nbytes for array in jax.live_arrays())


seen = {}
print("expected: a module and its arrays go with the last name for it, however it was made")
for make in (constructed, merged, cloned):
    gc.collect()
    gc.disable()  # so that it does not run by chance in these lines
    before = live()
    module = make()
    last = weakref.ref(module)
    del module
    gone, kept = last() is None, live() - before
    gc.enable()
    gc.collect()
    seen[make.__name__] = gone, kept >= 4 * SIDE**2, live() - before >= 4 * SIDE**2
    print(f"seen, {make.__name__}: module gone {gone}, {kept / 1e6:.1f} MB left; after gc.collect() {(live() - before) / 1e6:.1f} MB")
assert seen == {
    "constructed": (True, False, False),
    "merged": (True, True, False),
    "cloned": (True, True, False),
}
EOF
