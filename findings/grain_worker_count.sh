#!/usr/bin/env bash
# A Grain data set's position restored with another number of workers is a bare KeyError, or another item.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet grain==0.2.18
cd "$work"
cat > case.py <<'EOF'
from importlib.metadata import version

import grain.python as grain
from absl import flags


def data(workers):
    items = grain.MapDataset.range(16).to_iter_dataset(grain.ReadOptions(1, 1))
    return items.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)) if workers else items


def resumed(before, after):
    """Five items with one number of workers, and the next with another."""
    iterator = iter(data(before))
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    other = iter(data(after))
    try:
        other.set_state(state)
        return str(next(other))
    except (KeyError, IndexError) as error:
        return repr(error)


def main():
    flags.FLAGS(["case"])
    print("grain", version("grain"))
    print("expected: after items 0 to 4 comes item 5, or an error that names the two numbers of workers")
    found = {(before, after): resumed(before, after) for before, after in ((0, 0), (0, 1), (1, 0), (1, 2), (2, 1))}
    for (before, after), what in found.items():
        print(f"seen: {what}, with {before} workers and then {after}")
    assert found.pop((0, 0)) == "5"
    assert "5" not in found.values()


if __name__ == "__main__":
    main()
EOF
JAX_PLATFORMS=cpu "$work/venv/bin/python" case.py
