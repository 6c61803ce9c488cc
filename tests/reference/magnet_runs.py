"""Runs of MAGNET in processes of their own: on many devices, in several processes, until they are killed.

python -m tests.reference.magnet_runs layouts DIR [LAYOUT[,cached] ...] -- OPTION ...
python -m tests.reference.magnet_runs {killed | full} STEP -- OPTION ...
python -m tests.reference.magnet_runs train -- OPTION ...
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def arguments(options: dict) -> list[str]:
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return [f"--{key}={value}" for key, value in text.items()]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def start(*command: str, devices: int = 1, compiled: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """This module with a number of simulated devices; `compiled`: where programs are kept for the next such process."""
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}"
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | environment
    if compiled is not None:
        kept = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_ENABLE_COMPILATION_CACHE": "true"}
        variables |= kept | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.reference.magnet_runs", *command],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen[str], code: int = 0, seconds: float = 900) -> list[str]:
    """Standard output of processes that end with this exit status. Raises AssertionError with what went wrong."""
    said = []
    for process in processes:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
        assert process.returncode == code, errors[-6000:]
        said.append(output)
    return said


def held(frozen: dict) -> dict[str, float]:
    """The largest part that a device holds of each frozen model's bytes."""
    whole, most = Counter(), Counter()
    for name, array in frozen.items():
        model = name.split(".")[0]
        whole[model] += array.nbytes
        most[model] += max(shard.data.nbytes for shard in array.addressable_shards)
    return {model: most[model] / whole[model] for model in whole}


def layouts(directory: str, wanted: list[str], options: list[str]) -> None:
    """One JSON line for each layout: what a device holds of the frozen models. The runs lie in `directory`."""
    from seg4diff_jax.training import loop
    from seg4diff_jax.training.command import main

    prepare, shares = loop._prepare, {}

    def looked_at(*given):
        trainer = prepare(*given)
        shares.update(held(trainer.frozen))
        return trainer

    loop._prepare = looked_at
    for layout in wanted:
        sizes, _, cached = layout.partition(",")
        data, fsdp, tensor = sizes.split("x")
        mesh = [f"--run.mesh.data={data}", f"--run.mesh.fsdp={fsdp}", f"--run.mesh.tensor={tensor}"]
        kept = [f"--cache={directory}/cache"] if cached else []
        shares.clear()
        assert main([*options, *mesh, *kept, f"--run.out={directory}/{layout}"]) == 0
        print(json.dumps({"layout": layout, "held": dict(shares)}), flush=True)


def after(step: str, options: list[str], befalls: Callable[[], None]) -> int:
    """Train; once the checkpoint of a step is whole, something befalls the run in the step after it."""
    from seg4diff_jax.training import loop
    from seg4diff_jax.training.command import main, parse

    checkpoint = Path(parse(options).config.run.out) / "checkpoints" / step
    add = loop.Watch.add

    def struck(self, done: int, metrics: dict, items: np.ndarray) -> None:
        add(self, done, metrics, items)
        if done == int(step) + 1:
            while not checkpoint.is_dir():
                time.sleep(0.01)
            befalls()

    loop.Watch.add = struck
    return main(options)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill() -> None:
    """Files can no longer grow past what the log needs, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))


if __name__ == "__main__":
    place = sys.argv.index("--")
    words, others = sys.argv[2:place], sys.argv[place + 1 :]
    match sys.argv[1]:
        case "layouts":
            layouts(words[0], words[1:], others)
        case "killed":
            after(words[0], others, kill)
        case "full":
            sys.exit(after(words[0], others, fill))
        case "train":
            from seg4diff_jax.training.command import main

            sys.exit(main(others))
