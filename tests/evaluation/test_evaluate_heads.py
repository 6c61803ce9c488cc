"""Heads are scored one by one, beside their mean, and images come to the model's size as the release's do."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.evaluation.benchmarks import Benchmark, folder_benchmark
from seg4diff_jax.evaluation.measurement import Measurement, Settings
from seg4diff_jax.evaluation.options import chosen_heads
from seg4diff_jax.evaluation.readouts import Readout
from seg4diff_jax.evaluation.report.page import Way, sweep
from seg4diff_jax.evaluation.report.plots import plots
from seg4diff_jax.evaluation.run import evaluate
from seg4diff_jax.evaluation.zero_shot import without_images
from seg4diff_jax.flow import image_noise
from seg4diff_jax.miniature.world.shapes import scene, write_folder
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.segmentation.metrics import mean_iou
from tests.reference.evaluations import made_up_benchmark, made_up_evaluation
from tests.reference.inputs import SQUARE
from tests.reference.release import squashed
from tests.reference.ties import ignore, undecided

HEADS = (None, 2, 0)
SETTINGS = Settings((2,), (8,), (5,), batch_size=4, heads=HEADS)


@pytest.fixture(scope="module")
def benchmark(sd3, tmp_path_factory) -> Benchmark:
    """Without the pixels that rounding can decide about, in the mean over heads or in a head."""
    root = tmp_path_factory.mktemp("scenes")
    write_folder(root, [scene("test", index, 200) for index in range(4)])
    benchmark = folder_benchmark(root)
    for index, file in enumerate(sorted((root / "labels").iterdir())):
        scores = scores_of_heads(sd3, benchmark, index)
        looks = np.stack([scores.mean(axis=0), scores[0], scores[2]])
        permuted, _ = without_images(looks.reshape(3, 1, len(scores[0]), -1), np.array([index], np.int32), 5)
        looks = [*looks, *np.asarray(permuted).reshape(looks.shape)]
        ignore(file, np.any([undecided(each, (200, 200)) for each in looks], axis=0), few=0.02)
    return benchmark


@pytest.fixture(scope="module")
def evaluation(sd3, benchmark):
    return evaluate(sd3, benchmark, SETTINGS)


def scores_of_heads(pipe, benchmark: Benchmark, index: int) -> np.ndarray:
    """Of block 2 for one image and the classes that it has: [heads, classes, rows, columns]."""
    item = benchmark.source[index]
    names = [benchmark.classes[label] for label in np.unique(item["labels"]) if label != 255]
    noise = np.asarray(image_noise(5, [index], (SQUARE // 8, SQUARE // 8, 16)))[0]
    how = {"noise": noise, "size": (SQUARE, SQUARE), "request": AttentionRequest(scores=False)}
    probs = np.asarray(pipe.attention(item["image"], " ".join(names), blocks=2, step=8, **how)[2].probs[0])
    counts = [len(pipe.tokenizers.clip_l(name, add_special_tokens=False).input_ids) for name in names]
    spans = pairwise(1 + np.cumsum([0, *counts]))
    maps = np.stack([probs[:, :, first:last].mean(axis=2) for first, last in spans], axis=1)
    return maps.reshape(len(probs), len(names), SQUARE // 16, SQUARE // 16)


def head_by_head(pipe, benchmark: Benchmark) -> np.ndarray:
    """Of every head of block 2 by itself its confusion matrix, interpolated by PyTorch: [heads, classes, classes]."""
    classes = len(benchmark.classes)
    found = np.zeros((4, classes, classes), np.int64)
    for index in range(len(benchmark.source)):
        item = benchmark.source[index]
        labelled = item["labels"] != 255
        present = np.unique(item["labels"][labelled])
        for head, scores in enumerate(scores_of_heads(pipe, benchmark, index)):
            grown = F.interpolate(torch.tensor(scores)[None], size=item["labels"].shape, mode="bilinear")[0]
            predicted = present[grown.argmax(0).numpy()]
            np.add.at(found[head], (item["labels"][labelled], predicted[labelled]), 1)
    return found


def test_each_head_scores_what_its_own_maps_score_by_themselves(sd3, benchmark, evaluation):
    expected = head_by_head(sd3, benchmark)
    scores = {row.head: row.metrics for row in evaluation.rows}
    assert list(scores) == [*HEADS]
    for head in (2, 0):
        assert scores[head].miou == pytest.approx(100 * mean_iou(expected[head]), abs=1e-4)
    assert abs(scores[2].miou - scores[0].miou) > 0.1, "heads that score alike would tell nothing"


def test_the_mean_over_heads_scores_what_it_does_alone(sd3, benchmark, evaluation):
    alone = evaluate(sd3, benchmark, Settings((2,), (8,), (5,), batch_size=4))
    assert [row.head for row in alone.rows] == [None]
    assert evaluation.rows[0].metrics.miou == pytest.approx(alone.rows[0].metrics.miou, abs=1e-4)


def test_permuted_maps_are_those_of_the_same_head(sd3, benchmark, evaluation):
    alone = evaluate(sd3, benchmark, replace(SETTINGS, heads=(2,)))
    (expected,) = [row.metrics.miou for row in alone.baselines if row.baseline == "permuted"]
    permuted = {row.head: row.metrics.miou for row in evaluation.baselines if row.baseline == "permuted"}
    assert list(permuted) == [*HEADS]
    assert permuted[2] == pytest.approx(expected, abs=1e-4)
    assert abs(permuted[0] - expected) > 0.1
    assert abs(permuted[None] - expected) > 0.1


def test_images_come_to_the_size_of_the_model_as_the_released_code_resizes_them(sd3, benchmark):
    settings = Settings((0,), (8,), (0,), batch_size=1, resize="release")
    example = Measurement(sd3, benchmark, settings).reader.example(1)
    expected = squashed(benchmark.source[1]["image"], SQUARE)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(example.pixels, expected, atol=2e-4)
    plain = Measurement(sd3, benchmark, Settings((0,), (8,), (0,), batch_size=1)).reader.example(1)
    assert np.abs(plain.pixels - expected).max() > 0.05


def test_heads_and_blocks_make_places_in_their_order():
    settings = Settings((4, 1), (8,), (0,), batch_size=1, heads=(None, 3))
    assert settings.readouts == (Readout(4), Readout(4, 3), Readout(1), Readout(1, 3))


def test_what_heads_are_read_is_said_in_words_and_numbers():
    assert chosen_heads("mean", 4) == (None,)
    assert chosen_heads("all", 4) == (0, 1, 2, 3)
    assert chosen_heads("mean,2..3", 4) == (None, 2, 3)
    assert chosen_heads(["mean", 1], 4) == (None, 1)
    assert chosen_heads(2, 4) == (2,)


@pytest.mark.parametrize("value", ["4", "mean,mean", "all,1", "", "first"])
def test_heads_that_are_not_there_are_refused(value):
    with pytest.raises(ValueError, match="--heads is"):
        chosen_heads(value, 4)


def test_results_name_the_head_and_the_page_plots_them(tmp_path: Path, capsys):
    options = ["--data.scenes", "6", "--seeds", "0", "--heads", "mean,all", "--pictures", "2", "--blocks", "2,3"]
    assert main([*options, "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["block"], row["head"]) for row in rows[:6]] == [
        (2, None),
        *((2, head) for head in range(4)),
        (3, None),
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "by head, at block 3" in page
    assert "by block and head" in page
    assert "block 3, head 1" in capsys.readouterr().out
    with (tmp_path / "out" / "per_class.csv").open() as file:
        of_cone = [(row["block"], row["head"]) for row in csv.DictReader(file) if row["class"] == "cone"]
    assert of_cone == [(block, head) for block in "23" for head in ("", *"0123")]


def test_lines_over_blocks_are_of_the_mean_of_heads_even_where_a_single_head_is_better():
    (row,) = made_up_evaluation(made_up_benchmark(("cat", "sky"))).rows
    scores = {(1, None): 50.0, (1, 0): 20.0, (1, 1): 60.0, (2, None): 40.0, (2, 0): 45.0, (2, 1): 10.0}
    rows = [
        replace(row, block=block, head=head, metrics=replace(row.metrics, miou=miou))
        for (block, head), miou in scores.items()
    ]
    way = Way("open_vocabulary", "present")
    found = sweep(way, rows)
    assert (found.best, found.head, found.read) == ((1, 8), 1, None)
    assert found.scores == {(1, 8): (50.0, 0.0), (2, 8): (40.0, 0.0)}
    assert found.heads[2, 0] == (45.0, 0.0)
    single = sweep(way, [row for row in rows if row.head is not None])
    assert single.scores == {(1, 8): (60.0, 0.0), (2, 8): (10.0, 0.0)}
    captions = [plot.caption for plot in plots([single], None)]
    assert captions == [
        "by block, at noise level 8, of head 1",
        "by head, at block 1 and noise level 8",
        "by block and head",
    ]


def test_a_block_cannot_be_named_the_expert_by_single_heads(tmp_path: Path, capsys):
    assert main(["--heads", "all", "--name-expert", "--out", str(tmp_path / "out")]) == 1
    assert "add mean to --heads" in capsys.readouterr().err
