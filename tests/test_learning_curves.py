"""Curves of mean IoU over training, from the logs that `train.py` writes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.learning_curves import curves, main
from seg4diff_jax.reporting.svg_plots import BEST


def logged(run: Path, scores: dict[int, list[float]]) -> Path:
    run.mkdir()
    lines = [{"step": 1, "loss": 1.0}]  # most lines are not of evaluations
    for step, blocks in scores.items():
        at = {f"validation/miou/{block}@{sigma}": value for block, value in enumerate(blocks) for sigma in (0.3, 0.5)}
        lines.append({"step": step, "validation/miou": max(blocks), "validation/things/0@0.3": 99.0} | at)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_steps_of_a_run_that_goes_on_from_another_are_counted_on(tmp_path):
    first = logged(tmp_path / "first", {10: [20.0, 30.0], 20: [21.0, 40.0]})
    second = logged(tmp_path / "second", {5: [22.0, 50.0]})
    assert curves([first, second], "0.3") == ([10, 20, 25], [[20.0, 21.0, 22.0], [30.0, 40.0, 50.0]])


def test_a_noise_level_that_was_not_evaluated_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no mean IoU at noise level 0\.9"):
        curves([logged(tmp_path / "run", {10: [20.0]})], "0.9")


def test_the_block_that_is_best_at_the_end_stands_out(tmp_path, monkeypatch):
    run = logged(tmp_path / "run", {10: [30.0, 20.0, 10.0], 20: [25.0, 40.0, 10.0]})
    out = tmp_path / "curves.svg"
    monkeypatch.setattr(sys, "argv", ["learning_curves.py", str(run), "--out", str(out)])
    main()
    drawn = ElementTree.parse(out)
    lines = drawn.iterfind(".//{*}g[@class='line']/{*}path")
    (path,) = [line.attrib["d"] for line in lines if f"stroke: {BEST}" in line.attrib["style"]]
    heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]
    assert heights[1] < heights[0]  # only block 1 rises
    assert "block 1: 40.0" in "".join(drawn.getroot().itertext())
