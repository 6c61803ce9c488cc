#!/usr/bin/env bash
# Orbax's CheckpointManager keeps the checkpoint whose metric is NaN as the best, and deletes the best one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 flax==0.12.8
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import tempfile

import numpy as np
import orbax.checkpoint as ocp

print("orbax-checkpoint", ocp.__version__)
options = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=lambda metrics: metrics["miou"], best_mode="max")
with tempfile.TemporaryDirectory() as directory, ocp.CheckpointManager(directory, options=options) as manager:
    for step, miou in ((1, 0.9), (2, float("nan"))):
        manager.save(step, args=ocp.args.StandardSave({"w": np.zeros(2)}), metrics={"miou": miou})
        manager.wait_until_finished()
    best, kept = manager.best_step(), list(manager.all_steps())
print("expected: step 1, whose metric is 0.9, is the best and is kept; step 2, whose metric is no number, is not")
print(f"seen: best {best}, kept {kept}")
assert (best, kept) == (2, [2])
EOF
