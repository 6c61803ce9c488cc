"""The scripts in benchmarks/ run, on shapes so small that their figures mean nothing; their arithmetic is PyTorch's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.convert_checkpoint import CONFIGS
from benchmarks.real_shapes.flops import TEXT_TOKENS, stages
from tests.reference.ties import FEW, SCORES, upsampling_error

ROOT = Path(__file__).parents[1]
TERA = 1e12
CPU = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(script: str, *options: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    done = subprocess.run(command, env=CPU, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def counted(module: torch.nn.Module, *inputs: torch.Tensor, **named: torch.Tensor) -> int:
    """PyTorch's own count of a forward pass; on the meta device nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **named)
    return counter.get_total_flops()


def test_operations_of_sd3_at_its_real_size_are_those_that_pytorch_counts():
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**CONFIGS["transformer"])
        passed = counted(
            transformer,
            hidden_states=torch.empty(1, 16, 128, 128),
            encoder_hidden_states=torch.empty(1, TEXT_TOKENS, 4096),
            pooled_projections=torch.empty(1, 2048),
            timestep=torch.empty(1),
        )
        vae = AutoencoderKL(**CONFIGS["vae"])
        encoded = counted(vae.encoder, torch.empty(1, 3, 1024, 1024))
    release = stages(CONFIGS["transformer"], CONFIGS["vae"], 1024, 9)["release"]
    assert sum(release.values()) - release["autoencoder"] == pytest.approx(passed, rel=1e-4)
    assert release["autoencoder"] == pytest.approx(encoded, rel=1e-4)


def test_masks_need_blocks_0_to_8_and_of_block_9_the_maps():
    found = stages(CONFIGS["transformer"], CONFIGS["vae"], 1024, 9)
    needed, release = found["needed"], found["release"]
    assert needed["blocks before"] / TERA == pytest.approx(9 * 0.352, rel=0.002)
    assert needed["expert block"] / TERA == pytest.approx(0.095, abs=0.003)
    assert sum(release.values()) / sum(needed.values()) == pytest.approx(1.64, abs=0.01)


def test_both_sides_of_the_real_shapes_find_the_same_labels(tmp_path):
    options = ("--shapes", "tiny", "--layers", "3", "--block", "1", "--size", "64", "--batch", "2", "--repeats", "1")
    printed = run("zero_shot_real_shapes.py", *options, "--json_file", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    agreement = figures["agreement"]
    assert agreement["scores_differ"] <= SCORES
    assert agreement["equal_labels"] >= 1 - FEW
    assert agreement["ties_within"] <= 2 * (SCORES + upsampling_error((4, 4))), "labels differ where rounding decides"
    assert set(figures["rows"]) == {"release", "ours, batch 2"}
    assert "matmul peak: ours" in printed


def test_a_whole_vocabulary_is_timed_beside_the_classes_present():
    small = ("--shapes=tiny", "--block=1", "--size=64", "--images=1", "--batch=1", "--repeats=1")
    printed = run("whole_vocabulary.py", *small)
    names = ("classes present", "whole vocabulary", "both in one run")
    rows = [next(line for line in printed.splitlines() if line.startswith(f"│ {name}")) for name in names]
    assert [cells(row)[1:3] for row in rows] == [["1", "1"], ["3", "3"], ["4", "4"]], "prompts, and launches for them"
    assert all(float(cell) > 0 for row in rows for cell in cells(row)[3:])
    operations = [line for line in printed.splitlines() if line.startswith(("│ 64 ", "│ 128 "))]
    assert [cells(row)[6] for row in operations[::2]] == ["1.000", "1.000"]
    assert [float(cells(row)[8]) < 3 for row in operations[1::2]] == [True, True], "the autoencoder runs once"


def test_reading_is_timed_through_the_evaluators_reader_for_each_layout():
    printed = run("decode.py", "--images", "2", "--size", "64", "--batch", "2", "--repeats", "1")
    for name, pixels in (("voc20", "500 x 375"), ("coco-171", "640 x 480"), ("cityscapes19", "2048 x 1024")):
        (row,) = [line for line in printed.splitlines() if name in line]
        assert pixels in row
        assert float(row.split("│")[-2]) > 0


def test_magnets_gain_is_the_last_evaluation_of_each_run_and_seeds_make_one_line(tmp_path):
    rows = [{"step": 1, "validation/miou": 50.0, "validation/base_miou": 60.0}, {"step": 2, "loss": 1.0}]
    for seed, after in (("0", 63.0), ("1", 65.0)):
        run_of_seed = tmp_path / f"seed={seed}"
        (run_of_seed / "export").mkdir(parents=True)
        scores = {"miou": after, "base_miou": 60.0, "velocity_loss": 0.5, "base_velocity_loss": 0.75}
        last = {"step": 3} | {f"validation/{name}": value for name, value in scores.items()}
        (run_of_seed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, last]))
    printed = run("magnet_gain.py", "--out", str(tmp_path), "--vary", "run.seed=0,1")
    (line,) = [line for line in printed.splitlines() if line.startswith("│ 2 ")]
    before, after, change, *_, loss = (cell.strip() for cell in line.split("│")[2:-1])
    assert (before, after, change) == ("60.00 ± 0.00", "64.00 ± 1.41", "+4.00 ± 1.41")
    assert loss == "-0.25000 ± 0.00000"


def test_three_readings_of_the_same_maps_are_scored(tmp_path):
    printed = run("magnet_readouts.py", "[]", "--scenes", "2")
    (line,) = [line for line in printed.splitlines() if "without adapters" in line]
    scores = [float(cell) for cell in line.split("│")[2:-1]]
    assert len(scores) == 3
    assert all(0 <= score <= 100 for score in scores)
    assert scores[0] > scores[1]  # the miniature's masks lie in the probabilities


def test_refined_masks_are_scored_and_timed_beside_the_papers():
    rows = ("the paper's masks", "chosen", "chosen, 2 views")
    small = ("--scenes=4", "--seeds=[0, 1]", "--repeats=1", f"--rows={json.dumps(rows)}")
    printed = run("better_masks.py", *small)
    for name in rows:
        _, present, everything, *times = cells(next(line for line in printed.splitlines() if f"│ {name} " in line))
        assert 0 < float(present.split()[0]) <= 100
        assert 0 < float(everything.split()[0]) <= 100
        assert all(float(each.removesuffix(" x")) > 0 for each in times)


def test_a_run_with_masks_is_timed_beside_one_without():
    printed = run("generated_masks.py", "--size=32", "--layers=2", "--steps=1", "--repeats=1", "--miniature_repeats=1")
    for kind in ("miniature, 64 px, 28 steps", "2 blocks, 32 px, 1 steps"):
        rows = [line for line in printed.splitlines() if kind in line]
        assert len(rows) == 2
        assert all(float(cell) > 0 for row in rows for cell in row.split("│")[4:-1])


def test_pictures_per_second_stand_beside_those_of_diffusers_which_makes_the_same():
    small = ("--layers=2", "--heads=2", "--size=32", "--steps=2", "--miniature_steps=2", "--repeats=1", "--threads=1")
    printed = run("generated_speed.py", *small, '--cases=["miniature", "random blocks, no T5"]')
    for title in ("miniature, 64 px", "2 random blocks, no T5, 32 px"):
        rows = [line for line in printed.splitlines() if f"{title}, 2 steps" in line]
        assert [cells(row)[1] for row in rows] == ["diffusers", "ours"]
        assert all(float(cell) > 0 for row in rows for cell in cells(row)[2:7])
    (differ,) = [line for line in printed.splitlines() if line.startswith("largest difference: ")]
    levels, of_latent = (float(part.split(": ")[-1].split()[0]) for part in differ.split("; "))
    assert levels < 0.51
    assert of_latent < 1e-4


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("│")[1:-1]]
