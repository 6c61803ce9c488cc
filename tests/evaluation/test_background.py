"""Background by thresholds and competitors: against pixels compared one by one, and images segmented one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.evaluation import readouts
from seg4diff_jax.evaluation.background import at_thresholds
from seg4diff_jax.evaluation.benchmarks import folder_benchmark
from seg4diff_jax.evaluation.measurement import Settings
from seg4diff_jax.evaluation.run import evaluate
from seg4diff_jax.evaluation.wording import Words
from seg4diff_jax.evaluation.zero_shot import Tally, Thresholds, count
from seg4diff_jax.flow import image_noise
from tests.reference.inputs import SQUARE
from tests.reference.ties import SCORES, ignore, undecided, upsampling_error
from tests.reference.varied_set import NAMES, scored, write_images

CLASSES = ("background", *NAMES[1:8])
COMPETITORS = (NAMES[9], NAMES[10])
OWN_SIZES = [(70, 120), (100, 66), (90, 90)]
SEED, STEP, BLOCK = 5, 8, 0


# ---- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [0, 3])
def test_counts_at_each_threshold_are_those_of_pixels_compared_one_by_one(background):
    images, classes, side, thresholds = 3, 5, 6, (0.3, 0.6, 0.8)
    draw = np.random.default_rng(background)
    scores = draw.random((2, images, 8, side * side)).astype(np.float32) ** 3
    truth = draw.choice([*range(classes), 255], (images, side, side)).astype(np.uint8)
    class_of_row = np.full((images, 8), 255, np.int32)
    class_of_row[0, :6] = [0, 1, 2, 3, background, background]  # competitors
    class_of_row[1, :3] = [4, 2, background]
    class_of_row[2, :2] = [4, 2]  # not asked for background
    before = jnp.zeros((2, len(thresholds) + 1, classes, classes), jnp.int32)
    sizes, below = np.full((images, 2), side, np.int32), np.array(thresholds, np.float32)
    counted, right = count(before, scores, truth, sizes, class_of_row, below, np.int32(background), grid=(side, side))
    found = at_thresholds(np.asarray(counted).astype(np.int64), background)
    expected = np.zeros((2, len(thresholds), classes, classes), np.int64)
    hits = np.zeros((2, len(thresholds), images), np.int64)
    for readout, number, image in np.ndindex(2, len(thresholds), images):
        rows = int((class_of_row[image] != 255).sum())
        for pixel in range(side * side):
            best = int(scores[readout, image, :rows, pixel].argmax())
            label = class_of_row[image, best]
            if background in class_of_row[image] and scores[readout, image, best, pixel] < below[number]:
                label = background
            true = truth[image].ravel()[pixel]
            if true != 255:
                expected[readout, number, true, label] += 1
                hits[readout, number, image] += true == label
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(right, hits.reshape(-1, images))


def test_a_tally_has_a_matrix_for_each_readout_and_threshold_and_one_without_thresholds():
    assert Tally(2, 4, Thresholds((0.1, 0.2, 0.3), 1)).total().shape == (6, 4, 4)
    assert Tally(2, 4).total().shape == (2, 4, 4)


# ---- images ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Images of noise, most of whose stripes are background."""
    root = write_images(tmp_path_factory.mktemp("set") / "others", OWN_SIZES)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for index, (_, width) in enumerate(OWN_SIZES):
        file = root / "labels" / f"{index}.png"
        stripes = np.array([0, 1 + index, 0, 2 + index, 7])[np.arange(width) * 5 // width]
        Image.fromarray(np.where(np.asarray(Image.open(file)) == 255, 255, stripes).astype(np.uint8)).save(file)
    return root


def upsampled(sd3, image: np.ndarray, index: int, names: list[str]) -> np.ndarray:
    """Scores of an image that is segmented by itself, at its own size: float64 [names, height, width]."""
    noise = np.asarray(image_noise(SEED, [index], (SQUARE // 8, SQUARE // 8, 16)))[0]
    found = sd3.segment(image, names, block=BLOCK, step=STEP, noise=noise, size=(SQUARE, SQUARE))
    return F.interpolate(torch.from_numpy(found.scores).double()[None], image.shape[:2], mode="bilinear")[0].numpy()


@pytest.fixture(scope="module")
def predictions(sd3, root) -> tuple[tuple[float, ...], dict[tuple[str, float], list[np.ndarray]]]:
    """Two thresholds, and by kind of prompts and threshold each image's labels, made one by one.

    Pixels that rounding can decide about are left out of the label files.
    """
    source, scores = folder_benchmark(root).source, {}
    for index in range(len(OWN_SIZES)):
        item = source[index]
        held = [label for label in np.unique(item["labels"]).tolist() if label not in (0, 255)]
        assert (item["labels"] == 0).any()
        for kind, asked in (("present", held), ("all", [*range(1, len(CLASSES))])):
            names = [*(CLASSES[label] for label in asked), *COMPETITORS]
            scores[kind, index] = [*asked, 0, 0], upsampled(sd3, item["image"], index, names)
    best = np.concatenate([each.max(axis=0).ravel() for (kind, _), (_, each) in scores.items() if kind == "all"])
    thresholds = tuple(np.quantile(best, [0.25, 0.6]).tolist())
    error = 2 * (SCORES + upsampling_error((SQUARE // 16, SQUARE // 16)))
    found: dict[tuple[str, float], list[np.ndarray]] = {}
    for index in range(len(OWN_SIZES)):
        unsure = np.zeros(OWN_SIZES[index], bool)
        for kind in ("present", "all"):
            labels, each = scores[kind, index]
            unsure |= undecided(each, OWN_SIZES[index])
            for threshold in thresholds:
                top = each.max(axis=0)
                unsure |= abs(top - threshold) <= error * each.max()
                made = np.where(top < threshold, 0, np.array(labels)[each.argmax(axis=0)])
                found.setdefault((kind, threshold), []).append(made)
        ignore(root / "labels" / f"{index}.png", unsure, few=0.02)
    return thresholds, found


@pytest.fixture(scope="module")
def out(sd3_checkpoint, root, predictions, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results") / "out"
    options = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", str(BLOCK), "--steps", str(STEP)]
    options += ["--seeds", str(SEED), "--batch-size", "2", "--prompts", "present,all", "--pictures", "2"]
    options += [f"--background.threshold={','.join(map(repr, predictions[0]))}"]
    options += [f"--background.competitors={','.join(COMPETITORS)}"]
    assert main([*options, "--out", str(out)]) == 0
    return out


def test_scores_are_those_of_images_segmented_one_by_one(out, root, predictions):
    source, (_, expected) = folder_benchmark(root).source, predictions
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["prompts"], row["threshold"]) for row in rows] == list(expected)
    for row in rows:
        pairs = []
        for index, predicted in enumerate(expected[row["prompts"], row["threshold"]]):
            truth = source[index]["labels"]
            pairs.append(np.stack([truth[truth != 255], predicted[truth != 255]], axis=-1))
        miou, accuracy = scored(np.concatenate(pairs), len(CLASSES))
        assert (row["miou"], row["pixel_accuracy"]) == pytest.approx((miou, accuracy), abs=1e-3)


def test_results_record_what_finds_the_background_and_its_share_of_guesses(out, predictions):
    contents, (thresholds, _) = json.loads((out / "results.json").read_text()), predictions
    for row in contents["rows"] + contents["baselines"]:
        assert (row["background"], row["competitors"]) == ("scored", list(COMPETITORS))
        assert (row["template"], row["stop_words"], row["synonyms"]) == ("{}", [], None)
    assert contents["config"]["background"] == {"threshold": list(thresholds), "competitors": ",".join(COMPETITORS)}
    kinds = [(row["baseline"], row["threshold"]) for row in contents["baselines"] if row["prompts"] == "all"]
    assert kinds == [("constant", None), ("random", None), *(("permuted", each) for each in thresholds)]
    assert contents["best"]["threshold"] in thresholds
    assert f"threshold {contents['best']['threshold']:g}" in (out / "report.html").read_text()


@pytest.mark.parametrize("competitors", [(), COMPETITORS])
def test_images_are_shown_as_they_are_counted(sd3, root, predictions, competitors):
    benchmark = replace(folder_benchmark(root), words=Words(competitors=competitors))
    settings = Settings((BLOCK,), (STEP,), (SEED,), batch_size=2, prompts=("all",), thresholds=predictions[0])
    shown = evaluate(sd3, benchmark, settings, shown=len(OWN_SIZES)).shown
    assert len(shown) == len(OWN_SIZES)
    for one in shown:
        labelled = one.example.labels != 255
        assert one.accuracy == pytest.approx(100 * (one.predicted == one.example.labels)[labelled].mean(), abs=0.05)
        assert len(set(one.classes)) == len(one.classes) == len(one.scores)
        assert 0 in one.classes


def test_both_ways_of_asking_come_from_one_encoding_and_one_noise_of_each_seed(sd3, root, predictions, monkeypatch):
    called: list[str] = []

    def noted(name: str):
        function = getattr(readouts, name)

        def call(*arguments):
            called.append(name)
            return function(*arguments)

        return call

    for name in ("encode_images", "image_noise"):
        monkeypatch.setattr(readouts, name, noted(name))
    settings = Settings((BLOCK,), (STEP, 20), (SEED, 6), batch_size=2, prompts=("present", "all"))
    evaluate(sd3, folder_benchmark(root), settings)
    assert called == ["encode_images", "image_noise", "image_noise"] * 2, "two batches, two seeds"
