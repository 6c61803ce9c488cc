#!/usr/bin/env bash
# NumPy's sum and mean of a bfloat16 array stop growing at 256: a thousand ones have the mean 0.256.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet numpy==2.4.6 ml-dtypes==0.6.0
cd "$work"
"$work/venv/bin/python" - <<'EOF'
import ml_dtypes
import numpy as np

print("numpy", np.__version__, "ml_dtypes", ml_dtypes.__version__)
ones = np.ones(1000, ml_dtypes.bfloat16)
half = np.ones(1000, np.float16)
print("expected: the mean of a thousand ones is 1, as NumPy's own float16 has it")
print(f"seen: float16 {float(half.mean())}, bfloat16 {float(ones.mean())}, with dtype=float32 {ones.mean(dtype=np.float32)}")
assert float(half.mean()) == 1 and float(ones.sum()) == 256 and 0.25 < float(ones.mean()) < 0.26
assert ones.mean(dtype=np.float32) == 1
EOF
