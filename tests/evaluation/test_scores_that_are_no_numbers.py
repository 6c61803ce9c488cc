"""Wherever scores are compared, one that is no number is never the best, and no model without a loss has a score."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.learning_curves import curves, drawn
from benchmarks.magnet_gain import last_scores
from seg4diff_jax.evaluation.gallery import pictured
from seg4diff_jax.evaluation.rows import best_setting
from seg4diff_jax.magnet import held_out
from seg4diff_jax.magnet.held_out import HeldOut, HeldOutData
from seg4diff_jax.magnet.noise_levels import NoiseLevels
from seg4diff_jax.magnet.objective import MagnetObjective
from seg4diff_jax.miniature import contrastive, grounding
from seg4diff_jax.miniature.world.shapes import CLASSES
from seg4diff_jax.models.sd3.model import MMDiT
from tests.reference.evaluations import made_up_benchmark, made_up_evaluation

NAN, INF = math.nan, math.inf
BATCH = {
    "index": np.arange(2),
    "latents": np.zeros((2, 4, 4, 3), np.float32),
    "labels": np.zeros((2, 8, 8), np.uint8),
}


@pytest.mark.parametrize("worthless", [None, NAN, INF, -INF])
def test_the_best_setting_has_a_score_at_each_of_its_seeds(worthless):
    scores = {0: [80.0, worthless], 1: [worthless, worthless], 2: [30.0, 31.0], 3: [20.0, 25.0]}
    evaluation = made_up_evaluation(made_up_benchmark(("cat", "sky")), blocks=[*scores], seeds=(0, 1))
    rows = [
        replace(row, metrics=replace(row.metrics, miou=scores[row.block][row.seed]))
        for row in sorted(evaluation.rows, key=lambda row: row.block)
    ]
    assert best_setting(rows).block == 2
    assert best_setting(rows[:4]).block == 0, "the first where there is none"


def test_images_none_of_whose_pixels_count_are_not_shown():
    accuracy = np.array([NAN, 10.0, 90.0, NAN, 50.0, 70.0, NAN])
    found = pictured(accuracy, np.ones((7, 2), np.int64), 3)
    assert [(image, why) for image, why in found if why != "random"] == [(2, "best"), (1, "worst")]
    assert {image for image, _ in pictured(accuracy, np.ones((7, 2), np.int64), 7)} == {1, 2, 4, 5}


def test_curves_leave_out_what_the_log_has_as_null(tmp_path):
    at = lambda step, scores: (
        {"step": step, "validation/miou": 1.0}
        | {f"validation/miou/{block}@0.3": score for block, score in enumerate(scores)}
    )
    lines = [at(10, [20.0, 30.0]), at(20, [25.0, None]), at(30, [None, None])]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    steps, blocks = curves([tmp_path], "0.3")
    np.testing.assert_array_equal(blocks, [[20.0, 25.0], [30.0, NAN]])
    assert "block 0: 25.0" in drawn(["run"], [(steps, blocks)])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "nan" in drawn(["run"], [curves([tmp_path], "0.3")]), "of no block is there a last score"


def test_a_gain_over_a_score_that_was_no_number_is_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "validation/base_miou": 50.0, "validation/miou": null}\n')
    assert np.isnan(last_scores(tmp_path / "metrics.jsonl")["miou"])


@pytest.mark.parametrize(("losses", "miou"), [([0.5, 0.7], 100.0), ([0.5, NAN], NAN), ([INF, 0.5], NAN)])
def test_held_out_pictures_have_no_miou_where_their_loss_is_no_number(losses, miou, monkeypatch):
    scored = HeldOut.__new__(HeldOut)
    scored.classes, scored.block, scored.sigmas, scored.config = 2, 0, (0.2,), HeldOutData()
    scored._batches = [(BATCH, 2)]
    monkeypatch.setattr(held_out, "_score", lambda *_: (jnp.eye(2, dtype=jnp.int32), jnp.array(losses)))
    found = scored.scores(MMDiT.__new__(MMDiT))
    np.testing.assert_equal(found["miou"], miou)


@pytest.mark.parametrize(("loss", "miou"), [(0.5, 100.0), (NAN, NAN)])
def test_blocks_have_no_miou_where_the_loss_is_no_number(loss, miou, monkeypatch):
    classes = len(CLASSES)
    matrices = np.stack([np.roll(np.eye(classes, dtype=np.int32), 1, axis=1), np.eye(classes, dtype=np.int32)])
    monkeypatch.setattr(grounding, "evaluation_batches", lambda *_: [(BATCH, 2)])
    monkeypatch.setattr(grounding, "block_confusions", lambda *_: (matrices, np.array([0.5, loss])))
    found = grounding.grounding(nnx.Module(), [], sigmas=[0.3], batch_size=2)
    np.testing.assert_equal(found["miou"], miou)
    assert found["block"] == (1 if loss == 0.5 else 0)


@pytest.mark.parametrize(("row", "accuracy"), [([1.0, 0.0], 1.0), ([NAN, NAN], NAN)])
def test_embeddings_that_are_no_numbers_have_no_accuracy(row, accuracy, monkeypatch):
    images, texts = jnp.array([row, [0.0, 1.0]]), [jnp.eye(2), jnp.eye(2)]
    batch = dict.fromkeys(("image", "clip_l", "clip_g"))
    monkeypatch.setattr(contrastive, "evaluation_batches", lambda *_: [(batch, 2)])
    monkeypatch.setattr(contrastive, "_embed", lambda *_: (images, texts))
    found = contrastive.evaluate(contrastive.Towers.__new__(contrastive.Towers), source=[], choices=2)
    np.testing.assert_equal(found["accuracy"], accuracy)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_numbers_of_the_objective_and_its_noise_levels_are_finite(value):
    for option in ("velocity_weight", "focal_weight", "dice_weight", "alpha", "gamma"):
        with pytest.raises(ValueError, match=f"^{option} is {value}; expected"):
            MagnetObjective(**{option: value})
    for option, expected in {"mean": "-100 to 100", "std": "a finite number", "shift": "a finite number"}.items():
        with pytest.raises(ValueError, match=rf"^noise_levels\.{option} is {value}; expected {expected}"):
            NoiseLevels(**{option: value})
