"""An evaluation over several devices, several processes or several sittings gives the figures of one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seg4diff_jax.checkpoints import load
from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.evaluation.batches import LeftOut, Reader
from seg4diff_jax.evaluation.counts import Counts, together
from seg4diff_jax.evaluation.further import FurtherCounts
from seg4diff_jax.evaluation.measurement import check_batch_size
from seg4diff_jax.evaluation.report.page import PAGE
from seg4diff_jax.evaluation.unsupervised import SegmentCounts
from seg4diff_jax.evaluation.zero_shot import ConfusionCounts
from seg4diff_jax.miniature.world.shapes import CLASSES, scene, write_folder
from seg4diff_jax.segmentation.metrics import mean_iou
from seg4diff_jax.segmentation.presence import SCORES, auc
from seg4diff_jax.segmentation.unsupervised_scores import MatchCounts
from tests.reference.evaluation_run import measured
from tests.reference.processes import QUICK_TO_COMPILE, flags
from tests.reference.varied_set import SIZES, write_images

ROOT = Path(__file__).parents[2]
FIGURES = ("images", "miou", "pixel_accuracy", "iou", "boundary_iou_by_class", "pointing_by_class", "presence")
"""Of rows and baselines, by their names in `results.json`."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("set") / "varied", SIZES)


@pytest.fixture(scope="module")
def alone(sd3_checkpoint, root) -> Counts:
    """One device, one process, one sitting; two images a batch."""
    return measured(load(sd3_checkpoint, blocks=1), str(root), 2)


def run_apart(*arguments: str, more: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = os.environ | flags(*more) | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.reference.evaluation_run", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_eight_devices_that_share_batches_count_what_one_counts(tmp_path):
    # Of the miniature: random weights tie so often that too few pixels would be left.
    write_folder(tmp_path / "scenes", (scene("validation", index, 64) for index in range(12)))
    more = ("--xla_force_host_platform_device_count=8", QUICK_TO_COMPILE)
    process = run_apart("spread", str(tmp_path / "scenes"), str(tmp_path), more=more)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    spread, alone, single = (
        Counts.from_bytes((tmp_path / name).read_bytes()) for name in ("spread", "alone", "one by one")
    )
    assert spread.indices.tolist() == list(range(12))
    assert spread.counted.confusion[0].sum() == spread.histograms.sum() > 0
    names = ("pixels", "permuted", "one_segment")
    present = [[each[:1] for each in one.counted[:3]] for one in (spread, alone)]  # decoys tie elsewhere
    pairs = [*zip(*present, strict=True)]
    pairs += [(getattr(spread.matched, name), getattr(alone.matched, name)) for name in names]
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(spread.matched.segments, alone.matched.segments)
    assert figures(spread) == figures(single)
    for other in (alone, single):
        assert_same_but_for_rounding(spread, other)


def assert_same_but_for_rounding(one: Counts, other: Counts) -> None:
    """Counts of masks but for a pixel or two; scores of presence, and as many pairs in order but for those as close."""
    (ours,), (theirs,) = one.further.presence[0], other.further.presence[0]
    assert ours.shape == (len(SCORES), len(CLASSES), 12)
    area, others = (~np.isnan(ours[0])) & (ours[0] != theirs[0]), ours[1:]
    assert area.sum() <= 4, "a token that ties moves from one class to another"
    np.testing.assert_allclose(area * np.nan_to_num(ours[0] - theirs[0]), 0, atol=2 / 256)
    np.testing.assert_allclose(others, theirs[1:], rtol=1e-4)
    for mine, his, most in zip(one.further[:2], other.further[:2], (2 * 5**2, 1), strict=True):
        assert mine.shape == his.shape
        assert np.abs(mine - his).max() <= most, "a pixel that ties moves the bands around it"
    present = one.histograms.T > 0
    for mine, his in zip(ours[1:], theirs[1:], strict=True):
        for scores, same, there in zip(mine, his, present, strict=True):
            asked = ~np.isnan(scores)
            some, none = scores[asked & there], scores[asked & ~there]
            close = (np.abs(some[:, None] - none) <= 2e-4 * some[:, None]).sum()
            moved = abs(auc(scores[asked], there[asked]) - auc(same[asked], there[asked])) * some.size * none.size
            assert not some.size * none.size or moved <= close + 1e-9


def figures(outcome: Counts) -> list[float]:
    """mIoU in percent: with names, then of each protocol without."""
    (confusion,), (without,) = outcome.counted.confusion[0], outcome.matched.pixels[0]
    return [100 * mean_iou(confusion), *(100 * MatchCounts(*pixels).mean_iou() for pixels in without)]


def test_right_pixels_of_all_images_are_those_of_all_classes(alone):
    np.testing.assert_array_equal(alone.matched.right.sum(axis=-1), alone.matched.pixels[..., 0, :].sum(axis=-1))
    assert alone.matched.right.shape == (1, 1, 2, len(SIZES))
    assert (alone.matched.right <= alone.histograms.sum(axis=1)).all()


def test_a_batch_that_devices_cannot_share_evenly_is_refused():
    with pytest.raises(ValueError, match="--batch-size is 6: expected a multiple of the 8 devices"):
        check_batch_size(6, 8)


def test_two_processes_read_each_image_once_between_them_and_the_first_writes_the_figures_of_one(
    sd3_checkpoint, root, alone, tmp_path
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    options = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", "0", "--steps", "8"]
    options += ["--seeds", "5", "--batch-size", "2", "--pictures", "1", "--distributed"]
    options += ["--protocol", "open_vocabulary,unsupervised", "--unsupervised.threshold", "0.02"]
    alike = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [sys.executable, "evaluate.py", *options, "--out", str(tmp_path / str(number))],
            cwd=ROOT,
            env=alike | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    assert not (tmp_path / "1").exists()
    contents = json.loads((tmp_path / "0/results.json").read_text())
    assert {row["images"] for row in contents["rows"]} == {len(alone.indices)} == {len(SIZES)}
    assert [row["miou"] for row in contents["rows"]] == pytest.approx(figures(alone)[:2], abs=0.01)
    assert (contents["device"]["devices"], contents["device"]["processes"]) == (2, 2)
    assert (tmp_path / "0" / PAGE).read_text().count("<article") == 2, "an image for each protocol"


def test_a_run_that_was_killed_goes_on_where_it_was_and_ends_with_the_same_figures(
    sd3_checkpoint, root, tmp_path, monkeypatch, capsys
):
    options = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", "0", "--steps", "8"]
    options += ["--batch-size", "2", "--shard-batches", "1", "--pictures", "3"]
    options += ["--prompts", "present,decoys", "--metrics", "all"]
    options += ["--protocol", "open_vocabulary,unsupervised", "--unsupervised.threshold", "0.004,0.02"]
    of_one_seed, out = [*options, "--seeds", "5"], str(tmp_path / "out")
    process = run_apart("killed", *of_one_seed, "--out", out)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == -signal.SIGKILL, errors
    assert main([*of_one_seed, "--out", out]) == 1
    assert "holds an interrupted run: give --resume to go on" in capsys.readouterr().err
    assert main([*options, "--seeds", "5,6", "--out", out, "--resume"]) == 1
    assert "seeds was [5] and is [5, 6]" in capsys.readouterr().err
    assert main([*of_one_seed, "--unsupervised.threshold", "0.02", "--out", out, "--resume"]) == 1
    assert "unsupervised.threshold was [0.004, 0.02] and is [0.02]" in capsys.readouterr().err
    (tmp_path / "out/progress/000001.npz").write_bytes(b"damaged")

    read: list[int] = []
    example = Reader.example
    monkeypatch.setattr(Reader, "example", lambda self, index: (read.append(index), example(self, index))[1])
    assert main([*of_one_seed, "--out", out, "--resume"]) == 0
    assert (sorted(read[:5]), len(read)) == ([2, 3, 4, 5, 6], 5 + 2 * 3), "shown images are read once more"
    assert not (tmp_path / "out/progress").exists()
    assert main([*of_one_seed, "--out", str(tmp_path / "whole")]) == 0
    scores = [
        [{name: row.get(name) for name in FIGURES} for row in contents[part]]
        for contents in (json.loads((tmp_path / run / "results.json").read_text()) for run in ("out", "whole"))
        for part in ("rows", "baselines")
    ]
    assert scores[:2] == scores[2:]
    assert [len(some) for some in scores[:2]] == [4, 3 + 3 + 3]
    assert [row["presence"] is not None for row in scores[0]] == [False, True, False, False]
    images = [
        re.findall("<h2>Images.*(?=<h2>How)", (tmp_path / run / PAGE).read_text(), re.S) for run in ("out", "whole")
    ]
    assert images[0] == images[1]
    assert images[0][0].count("<article") == 2 * 3
    assert main([*of_one_seed, "--out", out, "--resume"]) == 1
    assert "is complete: there is nothing to --resume" in capsys.readouterr().err


def made_up_outcome(rng: np.random.Generator, indices: list[int], left_out: tuple[LeftOut, ...] = ()) -> Counts:
    images = len(indices)
    counted = ConfusionCounts._make([*rng.integers(0, 2**40, (3, 2, 3, 4, 4)), rng.integers(0, 9, (2, 3, images))])
    of_masks = (rng.integers(0, 2**40, (2, 3, rows, 4)) for rows in (3, 2))
    further = FurtherCounts(*of_masks, rng.random((2, 3, 3, 4, images)), rng.random((2, 3, images)))
    shapes = [(2, 3, 1, 3, 4), (2, 3, 1), (1, 3, 1, 3, 4), (1, 3, 1), (1, 1, 1, 3, 4), (2, 3, 1, images)]
    matched = SegmentCounts(*(rng.integers(0, 2**40, shape) for shape in shapes))
    histograms, cut_off = rng.integers(0, 9, (images, 4)), rng.integers(0, 9, images)
    return Counts(
        counted, further, matched, np.array(indices), histograms, cut_off, np.array([7]), np.array([0.5, 2.0]), left_out
    )


def test_what_was_counted_is_the_same_after_a_file():
    left_out = (LeftOut(3, "skipped", "ünreadable"),)
    outcome = made_up_outcome(np.random.default_rng(0), [0, 1, 2, 4, 5], left_out)
    again = Counts.from_bytes(outcome.to_bytes())
    for ours, theirs in zip(
        (*again.counted, *again.further, *again.matched, again.indices),
        (*outcome.counted, *outcome.further, *outcome.matched, outcome.indices),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert again.left_out == left_out


def test_parts_add_up_and_images_are_in_their_order_whatever_that_of_the_parts():
    rng = np.random.default_rng(1)
    later, sooner = made_up_outcome(rng, [3, 5]), made_up_outcome(rng, [0, 1, 4])
    both = together([later, sooner])
    assert both.indices.tolist() == [0, 1, 3, 4, 5]
    for part in (later, sooner):
        places = np.searchsorted(both.indices, part.indices)
        np.testing.assert_array_equal(both.histograms[places], part.histograms)
        np.testing.assert_array_equal(both.counted.right[..., places], part.counted.right)
        np.testing.assert_array_equal(both.matched.right[..., places], part.matched.right)
        np.testing.assert_array_equal(both.further.presence[..., places], part.further.presence)
    np.testing.assert_array_equal(both.matched.pixels, later.matched.pixels + sooner.matched.pixels)
