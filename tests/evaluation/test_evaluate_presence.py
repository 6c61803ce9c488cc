"""Which classes are there: scores of presence of a whole set, their figures, and what is written of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.evaluation.batches import assemble
from seg4diff_jax.evaluation.benchmarks import folder_benchmark
from seg4diff_jax.evaluation.further import Pass
from seg4diff_jax.evaluation.further_figures import Bin, PresenceFigures, presence_figures
from seg4diff_jax.evaluation.measurement import Measurement, Settings
from seg4diff_jax.evaluation.presence_lines import pooled
from seg4diff_jax.segmentation.presence import SCORES
from tests.reference import further_metrics
from tests.reference.varied_set import NAMES, write_images

SIZES = [(70, 120), (100, 66), (90, 90), (64, 64), (40, 60)]
"""The last batch is short."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("set") / "varied", SIZES)


@pytest.fixture(scope="module")
def measurement(sd3, root) -> Measurement:
    settings = Settings((0, 1), (8,), (5,), 2, prompts=("present", "decoys", "all"), metrics=("presence",))
    return Measurement(sd3, folder_benchmark(root), settings)


@pytest.fixture(scope="module")
def outcome(measurement):
    return measurement.outcome()


def test_each_image_has_its_own_scores_at_the_places_of_the_classes_asked_for(measurement, outcome):
    presence = outcome.further.presence
    assert presence.shape == (2, 2, len(SCORES), len(NAMES), len(SIZES))
    for place, one in enumerate(measurement.zero_shot.further.asking):
        for index in range(len(SIZES)):
            example, asked = measurement.reader.example(index), measurement.asked[one.prompts]
            classes, _ = asked(example)
            maps = measurement.zero_shot.scores(assemble([example], 2, asked), one)[:, 0]
            maps = maps.reshape(*maps.shape[:2], -1)[:, : len(classes)]
            alone = np.stack([further_metrics.presence(each) for each in maps])
            found = presence[place, :, :, :, index]
            assert np.flatnonzero(~np.isnan(found[0, 0])).tolist() == list(classes)
            np.testing.assert_allclose(found[..., list(classes)][:, 1:], alone[:, 1:], rtol=1e-4)
            # Ties of random weights are decided by rounding, token by token.
            np.testing.assert_allclose(found[..., list(classes)][:, 0], alone[:, 0], atol=0.05)


def test_presence_is_not_measured_where_only_present_classes_are_asked_for(measurement):
    assert measurement.zero_shot.further.asking == (Pass(8, 5, "decoys"), Pass(8, 5, "all"))


def test_decoys_are_asked_for_beside_the_classes_that_are_there(measurement, outcome):
    asked = ~np.isnan(outcome.further.presence[0, 0, 0].T)
    assert (asked >= (outcome.histograms > 0)).all()
    assert (asked.sum(axis=1) == (outcome.histograms > 0).sum(axis=1) + 4).all()


@pytest.fixture(scope="module")
def out(sd3_checkpoint, root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results") / "out"
    options = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", "0", "--steps", "8"]
    options += ["--seeds", "5", "--batch-size", "2", "--prompts", "present,lookalikes,all", "--pictures", "0"]
    assert main([*options, "--metrics", "presence", "--decoys.count", "2", "--out", str(out)]) == 0
    return out


def test_rows_that_name_absent_classes_have_figures_of_presence(out):
    contents = json.loads((out / "results.json").read_text())
    present, *others = contents["rows"]
    assert not {"presence", "decoys"} & present.keys()
    assert [(row.get("decoys"), row.get("decoys_seed")) for row in others] == [(2, 0), (None, None)]
    assert [row.get("decoys") for row in contents["baselines"] if row["prompts"] == "lookalikes"] == [2, 2, 2]
    for row in others:
        assert list(row["presence"]) == list(SCORES)
        for figures in row["presence"].values():
            assert 0 <= figures["auc_in_image"] <= 100
            assert sum(one["cases"] for one in figures["reliability"]) > 0
            assert set(figures["auc_by_class"]) == set(NAMES)
    assert contents["config"]["metrics"] == ["presence"]
    assert contents["config"]["decoys"] == {"count": 2, "seed": 0}
    text = (out / "report.html").read_text()
    assert text.count("Is it there?") == 1
    assert "Asked for the whole vocabulary" in text


def test_figures_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    histograms = draw.integers(0, 2, (30, 4)) * draw.integers(1, 99, (30, 4))
    histograms[:, 3] = 0
    scores = draw.random((3, 4, 30)).round(1)
    scores[:, 0, :5] = np.nan
    found = presence_figures(scores, histograms, ("a", "b", "c", "d"))
    assert list(found) == list(SCORES)
    for own, figures in zip(scores, found.values(), strict=True):
        by_class = {
            name: 100 * roc_auc_score(histograms[asked, at] > 0, own[at, asked])
            for at, name in enumerate("abc")
            for asked in [~np.isnan(own[at])]
        }
        assert figures.auc_by_class == {
            **{name: pytest.approx(each, abs=1e-3) for name, each in by_class.items()},
            "d": None,
        }
        assert figures.auc == pytest.approx(np.mean([*by_class.values()]), abs=1e-3)
        positives, cases = (histograms.T[~np.isnan(own)] > 0).sum(), (~np.isnan(own)).sum()
        assert figures.f1_of_all == pytest.approx(200 * positives / (positives + cases), abs=1e-3)


def test_a_set_where_everything_is_there_has_no_auc_and_no_error():
    found = presence_figures(np.ones((3, 2, 4)), np.ones((4, 2), int), ("a", "b"))["area"]
    assert (found.auc, found.auc_in_image, found.f1, found.calibration_error) == (None, None, 100, 0)
    json.dumps(asdict(found), allow_nan=False)


def test_bins_of_seeds_are_put_together_by_their_cases():
    bins = [(Bin(3, 10.0, 0.0), Bin(0, None, None)), (Bin(1, 30.0, 100.0), Bin(0, None, None))]
    figures = [PresenceFigures(*[None] * 6, reliability=each, auc_by_class={}) for each in bins]
    assert pooled(figures) == (Bin(4, 15.0, 25.0), Bin(0, None, None))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metrics", "presence"], "which names no absent classes to tell from present ones: add all, decoys or look"),
        (["--metrics", "presence", "--protocol", "unsupervised"], "nothing is asked for: add open_vocabulary"),
        (["--metrics", "iou"], "--metrics is 'iou': expected presence, "),
        (["--decoys.count", "2"], "--decoys.count is 2, but no prompts have decoys: add decoys or lookalikes"),
        (["--decoys.count", "0", "--prompts", "decoys"], "--decoys.count is 0: expected at least 1"),
        (["--decoys.seed", "-1", "--prompts", "decoys"], "--decoys.seed is -1: expected at least 0"),
    ],
)
def test_figures_that_prompts_cannot_give_are_refused(options, said, root, capsys):
    assert main(["--data.root", str(root), *options]) == 1
    assert said in capsys.readouterr().err
