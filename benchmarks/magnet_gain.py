"""Measures what MAGNET changes on held-out pictures: mIoU and flow-matching loss, before and after.

    python benchmarks/magnet_gain.py -- --held_out.split=test --held_out.count=500 --run.evaluate_every=1000
    python benchmarks/magnet_gain.py --vary run.seed=0 optimizer.learning_rate=1e-3,3e-3 -- --run.steps=300

The first command is the miniature's recipe, with three seeds, on its test scenes; by default runs score validation
scenes. Every combination of the varied options is a run of `train.py`. Finished runs in --out are not repeated, and
interrupted ones are resumed. Runs that differ only in their seed make one line with mean and spread. Arguments after
`--` go to train.py.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from seg4diff_jax.command_line.train import main as train
from seg4diff_jax.command_line.train import parse
from seg4diff_jax.training.loop import CONFIG

SEED = "run.seed"
COLUMNS = {"miou": ("mIoU, %", 2), "velocity_loss": ("flow-matching loss", 5)}
"""Title and digits of what is scored."""


def main(arguments: list[str]) -> int:
    own, passed = _split(arguments)
    options = _parser().parse_args(own)
    varied = dict(pair.split("=", 1) for pair in options.vary)
    varied = {name: values.split(",") for name, values in {SEED: "0,1,2", **varied}.items()}
    found: dict[tuple[str, ...], list[dict[str, float]]] = defaultdict(list)
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        out = Path(options.out) / "_".join(f"{name.split('.')[-1]}={value}" for name, value in chosen.items())
        settings = [f"--{name}={value}" for name, value in chosen.items()]
        run = [f"--config={options.config}", f"--run.out={out}", *passed, *settings]
        if (out / CONFIG).exists() and yaml.safe_load((out / CONFIG).read_text(encoding="utf-8")) != parse(run).record:
            print(f"error: {out} is a run with other options: remove it, or name another --out", file=sys.stderr)
            return 1
        if not (out / "export").exists():
            status = train([*run, "--resume"])
            if status:
                return status
        chosen.pop(SEED)
        found[tuple(chosen.values())].append(last_scores(out / "metrics.jsonl"))
    Console(width=140).print(table([name for name in varied if name != SEED], found))
    return 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="benchmarks/magnet_gain.py", description="MAGNET's gain on held-out pictures.")
    parser.add_argument("--config", default="configs/magnet/miniature.yaml", help="of train.py")
    parser.add_argument("--out", default="runs/magnet/gain", help="directory of the runs")
    parser.add_argument("--vary", nargs="*", default=[], help="NAME=VALUE,VALUE ...; run.seed is 0,1,2 if not given")
    return parser


def last_scores(metrics: Path) -> dict[str, float]:
    """Of the last evaluation that a run has logged; NaN where the log has null."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    last = [row for row in rows if "validation/base_miou" in row][-1]
    known = lambda value: np.nan if value is None else value
    return {name.removeprefix("validation/"): known(value) for name, value in last.items()}


def table(names: list[str], found: dict[tuple[str, ...], list[dict[str, float]]]) -> Table:
    shown = Table(*[name.split(".")[-1] for name in names], "seeds")
    for title, _ in COLUMNS.values():
        for when in (f"{title}: before", "after", "change"):
            shown.add_column(when, justify="right", no_wrap=True)
    for values, rows in found.items():
        cells = [*values, str(len(rows))]
        for name, (_, digits) in COLUMNS.items():
            before, after = (np.array([row[kind + name] for row in rows]) for kind in ("base_", ""))
            cells += [_spread(before, digits), _spread(after, digits), _spread(after - before, digits, sign="+")]
        shown.add_row(*cells)
    return shown


def _spread(values: np.ndarray, digits: int, sign: str = "") -> str:
    mean = f"{values.mean():{sign}.{digits}f}"
    return f"{mean} ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
