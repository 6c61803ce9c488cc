"""Images asked for the whole vocabulary, beside those asked for their own classes; and what is written of both."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seg4diff_jax as s4d
from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.evaluation import readouts
from seg4diff_jax.evaluation.batches import class_rows
from seg4diff_jax.evaluation.benchmarks import Benchmark, folder_benchmark
from seg4diff_jax.evaluation.measurement import Measurement, Settings
from seg4diff_jax.evaluation.options import kinds_of_prompts, numbers
from seg4diff_jax.evaluation.run import evaluate
from seg4diff_jax.evaluation.scores import constant_choices
from seg4diff_jax.evaluation.vocabulary import AllClasses, questions
from seg4diff_jax.flow import image_noise
from seg4diff_jax.segmentation.unsupervised_scores import UNSUPERVISED_PROTOCOLS
from tests.reference.inputs import SQUARE
from tests.reference.ties import ignore, undecided
from tests.reference.varied_set import NAMES, scored, write_images

OWN_SIZES = [(70, 120), (100, 66), (90, 90)]
"""The last batch is short."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("set") / "varied", OWN_SIZES)


@pytest.fixture(scope="module")
def alone(sd3, whole) -> list[s4d.Segmentation]:
    """Images segmented one by one, each asked for the whole vocabulary."""
    benchmark, found = folder_benchmark(whole), []
    for index in range(len(OWN_SIZES)):
        noise = np.asarray(image_noise(5, [index], (SQUARE // 8, SQUARE // 8, 16)))[0]
        image, how = benchmark.source[index]["image"], {"noise": noise, "size": (SQUARE, SQUARE)}
        found.append(sd3.segment(image, NAMES, block=0, step=8, **how))
    return found


@pytest.fixture(scope="module")
def root(whole, alone) -> Path:
    """Without the pixels that rounding can decide about: of the rest all runs count the same."""
    for index, (one, size) in enumerate(zip(alone, OWN_SIZES, strict=True)):
        ignore(whole / "labels" / f"{index}.png", undecided(one.scores, size), few=0.02)
    return whole


@pytest.fixture(scope="module")
def out(sd3_checkpoint, root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results") / "out"
    options = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", "0", "--steps", "8"]
    options += ["--seeds", "5", "--batch-size", "2", "--prompts", "present,all", "--pictures", "1"]
    assert main([*options, "--out", str(out)]) == 0
    return out


def test_both_ways_of_asking_have_rows_and_baselines_of_their_own(out):
    contents = json.loads((out / "results.json").read_text())
    assert [row["prompts"] for row in contents["rows"]] == ["present", "all"]
    guesses = [(row["prompts"], row["baseline"]) for row in contents["baselines"]]
    assert guesses == [(kind, name) for kind in ("present", "all") for name in ("constant", "random", "permuted")]
    assert contents["best"] == {"block": 0, "step": 8, "prompts": "present"}
    present, whole = contents["rows"]
    assert (present["reported"], present["skipped"], present["unlabelled_images"]) == ([], 0, 0)
    assert whole["miou"] < present["miou"], "names of absent classes take pixels"
    assert whole["seconds"] >= present["seconds"], "it takes more prompts"
    assert (contents["device"]["devices"], contents["device"]["processes"]) == (1, 1)
    assert contents["config"]["prompts"] == ["present", "all"]


def test_scores_of_the_whole_vocabulary_are_those_of_images_segmented_one_by_one(out, alone, root):
    benchmark, pairs = folder_benchmark(root), []
    for index, found in enumerate(alone):
        assert len(found.prompts) == 2
        truth = benchmark.source[index]["labels"]
        labelled = truth != 255
        pairs.append(np.stack([truth[labelled], found.labels[labelled]], axis=-1))
    miou, accuracy = scored(np.concatenate(pairs), len(NAMES))
    (row,) = [row for row in json.loads((out / "results.json").read_text())["rows"] if row["prompts"] == "all"]
    assert row["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-3)
    assert row["miou"] == pytest.approx(miou, abs=1e-3)


def test_each_class_of_each_row_is_a_line_of_a_table(out):
    rows = json.loads((out / "results.json").read_text())["rows"]
    with (out / "per_class.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(NAMES)
    found = {(line["prompts"], line["class"]): float(line["iou"]) for line in lines if line["iou"]}
    expected = {(row["prompts"], name): iou for row in rows for name, iou in row["iou"].items() if iou is not None}
    assert found == expected


def test_images_of_other_sizes_and_classes_compile_nothing_however_they_are_segmented(out, sd3, tmp_path):
    without = UNSUPERVISED_PROTOCOLS["ours"], UNSUPERVISED_PROTOCOLS["release"]
    settings = Settings((0,), (8,), (5,), batch_size=2, prompts=("present", "all"), unsupervised=without)
    first = write_images(tmp_path / "first", [(128, 70), (65, 100)])
    evaluate(sd3, folder_benchmark(first), settings)
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        second = write_images(tmp_path / "second", [(66, 80), (127, 65), (99, 100)], seed=9)
        evaluate(sd3, folder_benchmark(second), settings)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled


def test_images_are_encoded_once_and_noised_once_however_many_prompts_they_have(out, sd3, whole, monkeypatch):
    calls: list[str] = []

    def counted(name: str) -> None:
        function = getattr(readouts, name)
        monkeypatch.setattr(readouts, name, lambda *args, **how: calls.append(name) or function(*args, **how))

    for name in ("encode_images", "image_noise", "attention_maps"):
        counted(name)
    settings = Settings((0,), (8,), (5,), batch_size=2, prompts=("present", "all"))
    measurement = Measurement(sd3, folder_benchmark(whole), settings)
    outcome = measurement.outcome()
    # Two images and one have a prompt each, and then two each, in batches of two prompts.
    assert outcome.forwards.tolist() == [2, 3, 0]
    assert calls.count("attention_maps") == 2 + 3
    assert calls.count("encode_images") == 2
    assert calls.count("image_noise") == 2


def test_other_noise_is_drawn_for_other_images_and_seeds(sd3):
    forward = readouts.Forward(sd3, [readouts.Readout(0)])
    for seed, indices in ((5, [0, 1]), (5, [0, 2]), (6, [0, 2]), (5, [0, 1])):
        drawn = forward.noise(jnp.zeros((2, 4, 4, 16)), np.array(indices), seed)
        np.testing.assert_array_equal(drawn, image_noise(seed, indices, (4, 4, 16)))


def test_the_numbers_of_class_rows_are_few_and_a_vocabulary_has_hardly_more_than_it_needs():
    rows = [class_rows(classes) for classes in range(1, 256)]
    assert all(classes <= count for classes, count in enumerate(rows, 1))
    assert sorted(set(rows)) == [8, 16, *range(32, 257, 32)]
    assert {name: class_rows(count) for name, count in (("ade", 150), ("coco", 171))} == {"ade": 160, "coco": 192}


@pytest.mark.parametrize(("rule", "first"), [("ignored", 1), ("asked", 0), ("scored", 0)])
def test_background_is_in_the_vocabulary_unless_it_is_ignored(sd3, rule, first):
    classes = ("background", "cat", "sofa")
    benchmark = Benchmark("set", classes, [], background=0, rule=rule)
    asked = questions(benchmark, sd3.tokenizers, ("all",))["all"]
    assert isinstance(asked, AllClasses)
    assert asked.rows == tuple(range(first, 3))
    assert asked.prompts.prompts == (" ".join(classes[first:]),)


def test_a_constant_guesser_that_does_not_know_the_classes_says_one_class_of_all_images():
    histograms = np.array([[5, 0, 1], [0, 9, 0], [3, 0, 0]])
    expected = np.zeros((3, 3), np.int64)
    expected[:, 1] = histograms.sum(axis=0)
    np.testing.assert_array_equal(constant_choices(histograms, known=False)["commonest"], expected)


@pytest.mark.parametrize("wrong", ["", "some", "all,all", "present all"])
def test_ways_of_asking_are_some_of_those_that_there_are_each_once(wrong):
    assert kinds_of_prompts("present, all") == kinds_of_prompts(["present", "all"]) == ("present", "all")
    with pytest.raises(ValueError, match=r"--prompts is .*: expected present, all, decoys, lookalikes, or several"):
        kinds_of_prompts(wrong)


def test_lists_of_numbers_are_read_as_they_are_written():
    assert numbers("0..3", "--blocks", range(24)) == (0, 1, 2, 3)
    assert numbers("2,4,8..10", "--steps", range(1, 29)) == (2, 4, 8, 9, 10)
    assert numbers(8, "--steps", range(1, 29)) == (8,)
    assert numbers([2, 4], "--steps", range(1, 29)) == (2, 4)
    assert numbers("all", "--steps", range(1, 29)) == tuple(range(1, 29))
    for wrong in ("", "8,8", "3..1", "x", "-1"):
        with pytest.raises(ValueError, match="--steps is"):
            numbers(wrong, "--steps", range(1, 29))
