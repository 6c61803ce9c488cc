"""Boundary IoU and the pointing game of a set are those of its images, one by one; and what is written of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from seg4diff_jax.checkpoints import load
from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.evaluation.batches import assemble
from seg4diff_jax.evaluation.benchmarks import folder_benchmark
from seg4diff_jax.evaluation.further import Pass
from seg4diff_jax.evaluation.measurement import Measurement, Settings
from seg4diff_jax.evaluation.zero_shot import PERMUTED
from seg4diff_jax.miniature.world.shapes import CLASSES, scene, write_folder
from seg4diff_jax.segmentation.boundaries import band_widths
from tests.reference.further_metrics import boundary, pointing, upsampled
from tests.reference.ties import undecided

IMAGES, SIZE, WIDTH = 5, (64, 64), 2
OPTIONS = ["--blocks", "3", "--steps", "3", "--seeds", "5", "--batch-size", "2", "--pictures", "0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The last batch is short."""
    root = tmp_path_factory.mktemp("set") / "scenes"
    write_folder(root, (scene("validation", index, SIZE[0]) for index in range(IMAGES)))
    return root


@pytest.fixture(scope="module")
def measurement(root) -> Measurement:
    settings = Settings((3,), (3,), (5,), 2, metrics=("boundary", "pointing"))
    return Measurement(load("miniature", blocks=4), folder_benchmark(root), settings)


@pytest.fixture(scope="module")
def further(measurement):
    return measurement.outcome().further


def test_counts_of_a_set_are_those_of_its_images(measurement, further):
    one, classes = Pass(3, 5), len(CLASSES)
    bands, points, ties = np.zeros((3, classes), int), np.zeros((2, classes), int), 0
    assert band_widths(np.array([SIZE])) == WIDTH
    for index in range(IMAGES):
        example, asked = measurement.reader.example(index), measurement.asked["present"]
        scores = measurement.zero_shot.scores(assemble([example], 2, asked), one)[0, 0, : len(example.present)]
        present = np.array(example.present)
        predicted = present[upsampled(scores, SIZE).argmax(axis=0)]
        bands += boundary(example.labels, predicted, WIDTH, classes)
        points += pointing(scores, example.labels, present, classes)
        ties += undecided(scores, SIZE).sum()
    place = measurement.zero_shot.further.passes.index(one)
    most = ties * (2 * WIDTH + 1) ** 2  # a pixel that rounding decides moves the bands around it
    assert most < 0.05 * bands[1].sum()
    assert np.abs(further.boundary[place, 0] - bands).max() <= most
    np.testing.assert_array_equal(further.pointing[place, 0], points)
    assert points[1].sum() == sum(len(measurement.reader.example(index).present) for index in range(IMAGES))


def test_maps_in_random_order_have_no_edges_and_point_anywhere(measurement, further):
    passes = measurement.zero_shot.further.passes
    own, permuted = passes.index(Pass(3, 5)), passes.index((PERMUTED, "present", 5))
    for counts in (further.boundary, further.pointing):
        hits = counts[:, 0, 0].sum(axis=1)
        assert hits[permuted] < 0.6 * hits[own]
    np.testing.assert_array_equal(further.boundary[own, 0, 1], further.boundary[permuted, 0, 1], "the truth's bands")


@pytest.fixture(scope="module")
def contents(root, tmp_path_factory) -> dict:
    found = {}
    for metrics in ("", "pointing,boundary"):
        out = tmp_path_factory.mktemp("results") / "out"
        chosen = ["--metrics", metrics] if metrics else []
        assert main(["--data.root", str(root), *OPTIONS, *chosen, "--out", str(out)]) == 0
        found[metrics] = json.loads((out / "results.json").read_text()), (out / "report.html").read_text()
    return found


def test_figures_are_means_over_classes_of_what_was_counted(contents, further):
    ((row,), baselines), page = (contents["pointing,boundary"][0][name] for name in ("rows", "baselines")), contents
    both, true, own = further.boundary[0, 0]
    shares = {
        "boundary_iou": [100 * b / (t + o - b) for b, t, o in zip(both, true, own, strict=True) if t],
        "pointing": [100 * hits / tried for hits, tried in further.pointing[0, 0].T if tried],
    }
    for name, expected in shares.items():
        assert row[name] == pytest.approx(np.mean(expected), abs=0.3)
        known = [value for value in row[f"{name}_by_class"].values() if value is not None]
        assert len(known) == len(expected)
        assert row[name] == pytest.approx(np.mean(known), abs=1e-3)
        guessed = {each["baseline"]: each.get(name) for each in baselines}
        assert guessed["permuted"] < row[name]
        assert guessed["constant"] is guessed["random"] is None
    for title in ("boundary IoU", "pointing game"):
        assert title in page["pointing,boundary"][1]
        assert title not in page[""][1]


def test_what_is_not_asked_for_is_not_measured(contents):
    results, _ = contents[""]
    for row in (*results["rows"], *results["baselines"]):
        assert not {"boundary_iou", "pointing", "presence"} & row.keys()
