"""MAGNET before and after: one model, with its adapters and without, and figures of the commands that it stands for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import seg4diff_jax as s4d
from seg4diff_jax.analysis.clip import load_clip
from seg4diff_jax.analysis.picture_scores import PictureScorers, clip_t
from seg4diff_jax.evaluation.benchmarks import folder_benchmark
from seg4diff_jax.evaluation.measurement import Settings
from seg4diff_jax.evaluation.run import evaluate
from seg4diff_jax.miniature.world.shapes import scene, write_folder
from seg4diff_jax.reproduction import finetuning
from seg4diff_jax.reproduction.subject import GUIDANCE, Subject
from tests.reference.adapters import factors, release_names, write_release

BLOCK, STEPS, PROMPTS = 2, 2, ("a cat on the grass", "two red buses", "the sea")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("lora") / "lora.pth", release_names(factors()))


@pytest.fixture(scope="module")
def subject(sd3_checkpoint, adapters, tmp_path_factory) -> Subject:
    """With T5, which both models must read."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_folder(folder, (scene("test", index, 128) for index in range(2)))
    checkpoint = s4d.open(sd3_checkpoint, t5=True)
    pipe = checkpoint.load()
    pipe.expert_block = BLOCK
    scorers = PictureScorers(load_clip("miniature"))
    sizes = {"seeds": (0, 1), "batch_size": 2, "adapters": adapters}
    return Subject("sd3", checkpoint, pipe, PROMPTS, folder_benchmark(folder), scorers, **sizes)


@pytest.fixture(scope="module")
def measured(subject, tmp_path_factory) -> dict:
    told: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "STEPS", STEPS)
        found = finetuning.measure(subject, tmp_path_factory.mktemp("out"), told.append)
    assert told == sorted(told)
    assert told[-1] == 1
    return found


@pytest.mark.parametrize("kind", ["without", "with"])
def test_figures_are_those_of_the_model_with_adapters_and_without(subject, adapters, measured, sd3_checkpoint, kind):
    pipe = s4d.load(sd3_checkpoint, t5=True, lora=adapters if kind == "with" else None)
    made = pipe.generate(list(PROMPTS), steps=STEPS, guidance=GUIDANCE)
    cosines = 100 * clip_t(subject.scorers.clip, made, PROMPTS)
    np.testing.assert_allclose(measured[kind]["cosines"], cosines, atol=0.2)  # by up to one level of a pixel
    rows = evaluate(pipe, subject.benchmark, Settings((BLOCK,), (8,), (0, 1), 2)).rows
    np.testing.assert_allclose(measured[kind]["miou"], [row.metrics.miou for row in rows], atol=0.5)


def test_the_two_differ(measured):
    assert np.abs(np.subtract(measured["with"]["cosines"], measured["without"]["cosines"])).max() > 0.5
    assert measured["with"]["velocity_loss"] != measured["without"]["velocity_loss"]


def test_without_adapters_of_its_own_a_model_is_not_measured(subject, tmp_path):
    alone = finetuning.measure(Subject(**{**vars(subject), "adapters": None}), tmp_path, lambda part: None)
    assert alone == {"adapters": None}
