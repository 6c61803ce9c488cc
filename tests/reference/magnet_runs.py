"""Runs of MAGNET in processes of their own: on many devices, in several processes, until they are killed.

python -m tests.reference.magnet_runs layouts DIR [LAYOUT[,cached] ...] -- OPTION ...
python -m tests.reference.magnet_runs killed STEP -- OPTION ...
python -m tests.reference.magnet_runs stopped DIR STEP -- OPTION ...
python -m tests.reference.magnet_runs train -- OPTION ...
python -m tests.reference.magnet_runs resume RUN ... -- OPTION ...
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from seg4diff_jax.miniature.world.shapes import scene, write_folder
from seg4diff_jax.training import throughput
from tests.reference.processes import one_of_several


def arguments(options: dict) -> list[str]:
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return [f"--{key}={value}" for key, value in text.items()]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def small_run(model: Path, folder: Path, scenes: int, size: int) -> dict[str, Any]:
    """Options of a run on a folder of scenes, which is written."""
    write_folder(folder, [scene("train", index, size) for index in range(scenes)])
    return {
        "task": "magnet",
        "model": str(model),
        "block": 4,
        "remat": "nothing",
        "data.root": str(folder),
        "data.size": size,
        "data.rows": 4,
        "run.log_every": 1,
    }


def held(frozen: dict) -> dict[str, float]:
    """The largest part that a device holds of each frozen model's bytes."""
    whole, most = Counter(), Counter()
    for name, array in frozen.items():
        model = name.removeprefix("encoders.").split(".")[0]
        whole[model] += array.nbytes
        most[model] += max(shard.data.nbytes for shard in array.addressable_shards)
    return {model: most[model] / whole[model] for model in whole}


def layouts(directory: str, wanted: list[str], options: list[str]) -> None:
    """One JSON line for each layout: what a device holds of the frozen models. The runs lie in `directory`."""
    from seg4diff_jax.command_line.train import main
    from seg4diff_jax.training import loop

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
    from seg4diff_jax.command_line.train import main, parse
    from seg4diff_jax.training import loop

    checkpoint = Path(parse(options).config.run.out) / "checkpoints" / step
    add = loop.Watch.add

    def struck(self, done: int, metrics: dict, items: np.ndarray) -> None:
        add(self, done, metrics, items)
        if done == int(step) + 1:
            while not checkpoint.is_dir():
                time.sleep(0.01)
            befalls()

    loop.Watch.add = struck
    try:
        return main(options)
    finally:
        loop.Watch.add = add


def stopped(directory: str, step: str, options: list[str]) -> None:
    """One run after the other in this process: one that nothing stops, one that is told to stop, one that fills the
    disk, and last one that is killed, and the process with it.

    What a run says is in DIR/NAME.stderr, its exit status in DIR/NAME.status. Each has a file of its own, since threads
    that wrote to the full disk may go on complaining in the middle of a later run's line.
    """
    for name, befalls in {"whole": lambda: None, "told": tell, "full": fill, "killed": kill}.items():
        with Path(directory, f"{name}.stderr").open("w") as said:
            os.dup2(said.fileno(), sys.stderr.fileno())
        status = after(step, [*options, f"--run.out={directory}/{name}"], befalls)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(directory, f"{name}.status").write_text(str(status))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tell() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill() -> None:
    """Files can no longer grow past what the log needs, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))


if __name__ == "__main__":
    throughput.SIDE["cpu"] = 64  # nothing here is about the peak, which takes a second and all cores to measure
    place = sys.argv.index("--")
    words, others = sys.argv[2:place], sys.argv[place + 1 :]
    if one_of_several():
        others.append("--distributed")
    match sys.argv[1]:
        case "layouts":
            layouts(words[0], words[1:], others)
        case "killed":
            after(words[0], others, kill)
        case "stopped":
            stopped(words[0], words[1], others)
        case "train":
            from seg4diff_jax.command_line.train import main

            sys.exit(main(others))
        case "resume":
            from seg4diff_jax.command_line.train import main

            sys.exit(max(main([*others, f"--run.out={out}", "--resume"]) for out in words))
