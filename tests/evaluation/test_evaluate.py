"""Evaluation through compiled batches gives the scores of images segmented and counted one by one."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.evaluation import zero_shot
from seg4diff_jax.evaluation.batches import EvaluationBatch, Example, Reader, assemble
from seg4diff_jax.evaluation.benchmarks import Benchmark, folder_benchmark, scenes_benchmark
from seg4diff_jax.evaluation.measurement import Settings
from seg4diff_jax.evaluation.readouts import Forward, Readout
from seg4diff_jax.evaluation.run import Evaluation, evaluate
from seg4diff_jax.evaluation.scores import constant_choices, metrics
from seg4diff_jax.evaluation.vocabulary import PresentClasses, Vocabulary
from seg4diff_jax.evaluation.zero_shot import Pass, Tally, ZeroShot, count, without_images
from seg4diff_jax.flow import image_noise
from seg4diff_jax.miniature.world.shapes import CLASSES, STUFFS, THINGS, scene
from seg4diff_jax.prompt_cache import PromptCache
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS
from tests.reference.inputs import SQUARE
from tests.reference.random_weights import relative_error
from tests.reference.ties import ignore, undecided
from tests.reference.varied_set import NAMES, SIZES, one_by_one, pairs_of, scored, write_images

SQUARES = ((SQUARE, SQUARE),) * len(SIZES)
ASPECTS = ((112, 160), (160, 112), (128, 128), (96, 176), (112, 144), (176, 96), (128, 128))
"""What images of those sizes are seen at: all alike, or in the nearest of a few aspects."""
CROWDED = 4
"""The image that has all classes."""
DIGITS = 1e-3
"""What scores are rounded to, in percent, and less than a pixel is worth."""
COMPILATIONS: list[str] = []
SETTINGS = Settings(blocks=(0, 3), steps=(8, 2), seeds=(5,), batch_size=3)


@pytest.fixture(scope="module", autouse=True)
def _count_compilations() -> Iterator[None]:
    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            COMPILATIONS.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("set") / "varied", SIZES, CROWDED)


@pytest.fixture(scope="module")
def alone(sd3, whole) -> dict[tuple[int, int, tuple], list[s4d.Segmentation]]:
    """Images segmented one by one, by block, step and the sizes that they are seen at; seed 5."""
    looks = [(block, step, SQUARES) for block in SETTINGS.blocks for step in SETTINGS.steps]
    return {look: one_by_one(sd3, folder_benchmark(whole), *look) for look in [*looks, (3, 8, ASPECTS)]}


@pytest.fixture(scope="module")
def root(whole, alone) -> Path:
    """Without the pixels that rounding can decide about: of the rest all runs count the same."""
    for index, size in enumerate(SIZES):
        ties = [undecided(found[index].scores, size) for found in alone.values()]
        ignore(whole / "labels" / f"{index}.png", np.any(ties, axis=0), few=0.02)
    return whole


@pytest.fixture(scope="module")
def benchmark(root) -> Benchmark:
    return folder_benchmark(root)


@pytest.fixture(scope="module")
def evaluation(sd3, benchmark) -> Evaluation:
    return evaluate(sd3, benchmark, SETTINGS, shown=4)


def one_batch(pipe: s4d.Pipeline, benchmark: Benchmark, images: int) -> tuple[PresentClasses, EvaluationBatch]:
    """All images of a benchmark, filled up to that many."""
    items = Reader(benchmark, pipe.view).read(range(len(benchmark.source)))
    asked = PresentClasses(Vocabulary.of(benchmark, pipe.tokenizers))
    return asked, assemble([item for item in items if isinstance(item, Example)], images, asked)


# ---- the compiled path ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", SETTINGS.blocks)
@pytest.mark.parametrize("step", SETTINGS.steps)
def test_scores_are_those_of_images_segmented_one_by_one_and_counted_by_hand(alone, benchmark, evaluation, block, step):
    miou, accuracy = scored(pairs_of(benchmark, alone[block, step, SQUARES]), len(NAMES))
    (row,) = [row for row in evaluation.rows if (row.block, row.step) == (block, step)]
    assert row.metrics.pixel_accuracy == pytest.approx(accuracy, abs=DIGITS)
    assert row.metrics.miou == pytest.approx(miou, abs=DIGITS)
    assert (row.images.images, row.seed, row.prompts) == (len(SIZES), 5, "present")
    assert set(row.metrics.iou) == set(NAMES)


def test_scores_in_bfloat16_are_near_those_in_fp32(sd3, sd3_checkpoint, benchmark):
    _, batch = one_batch(sd3, benchmark, len(SIZES))
    looked = {"classes": len(NAMES), "steps": [8], "seeds": [5]}
    exact = ZeroShot(Forward(sd3, (Readout(3),)), **looked).scores(batch, Pass(8, 5))
    half = s4d.load(sd3_checkpoint, dtype="bfloat16")
    rounded = ZeroShot(Forward(half, (Readout(3),)), **looked).scores(batch, Pass(8, 5))
    assert 1e-4 < relative_error(rounded, exact) < 0.05


def test_images_are_seen_in_the_nearest_of_a_few_aspects_and_batched_by_it(sd3, alone, benchmark):
    one = Settings(blocks=(3,), steps=(8,), seeds=(5,), batch_size=3, resize="aspect")
    found = evaluate(sd3, benchmark, one, shown=6)
    miou, accuracy = scored(pairs_of(benchmark, alone[3, 8, ASPECTS]), len(NAMES))
    assert found.rows[0].metrics.pixel_accuracy == pytest.approx(accuracy, abs=DIGITS)
    assert found.rows[0].metrics.miou == pytest.approx(miou, abs=DIGITS)
    assert [one.why for one in found.shown] == ["best"] * 2 + ["random"] * 2 + ["worst"] * 2
    for shown in found.shown:
        assert shown.scores.shape[1:] == tuple(side // 16 for side in ASPECTS[shown.example.index])


def test_class_scores_of_a_batch_are_those_of_each_image_alone_also_over_several_prompts(sd3, benchmark):
    asked, batch = one_batch(sd3, benchmark, len(SIZES))
    assert len(asked(batch.examples[CROWDED])[1].prompts) > 1
    assert len(batch.prompts) == 2, "more prompts than images: two passes of the transformer"
    counting = ZeroShot(Forward(sd3, (Readout(0), Readout(3))), len(NAMES), steps=[8], seeds=[5])
    together = counting.scores(batch, Pass(8, 5))
    for place, example in enumerate(batch.examples):
        classes, _ = asked(example)
        image, noise = benchmark.source[place]["image"], np.asarray(image_noise(5, [place], (16, 16, 16)))[0]
        for row, block in enumerate((0, 3)):
            names = [NAMES[label] for label in classes]
            alone = sd3.segment(image, names, block=block, noise=noise, size=(SQUARE, SQUARE))
            assert relative_error(together[row, place, : len(classes)], alone.scores) <= 1e-5
        assert not together[:, place, len(classes) :].any()


def test_one_block_is_scored_as_in_a_pass_that_records_several(sd3_checkpoint, benchmark, evaluation):
    pipe = s4d.load(sd3_checkpoint, blocks=4)
    alone = evaluate(pipe, benchmark, Settings(blocks=(3,), steps=(8,), seeds=(5,), batch_size=3))
    (expected,) = [row for row in evaluation.rows if (row.block, row.step) == (3, 8)]
    assert alone.rows[0].metrics.pixel_accuracy == pytest.approx(expected.metrics.pixel_accuracy, abs=DIGITS)


def test_neither_batch_size_nor_images_left_out_before_it_change_an_images_noise(
    sd3, evaluation, root, benchmark, tmp_path
):
    other = evaluate(sd3, benchmark, Settings(blocks=(0,), steps=(8,), seeds=(5,), batch_size=4))
    expected = [row.metrics.pixel_accuracy for row in evaluation.rows if (row.block, row.step) == (0, 8)]
    assert [row.metrics.pixel_accuracy for row in other.rows] == pytest.approx(expected, abs=DIGITS)
    assert other.baselines[1].metrics.pixel_accuracy == pytest.approx(
        evaluation.baselines[1].metrics.pixel_accuracy, abs=0.01
    )
    write_images(tmp_path / "set", SIZES, CROWDED)
    (tmp_path / "set" / "images" / "0.png").write_bytes(b"")
    reader = Reader(folder_benchmark(tmp_path / "set"), sd3.view, skip_unreadable=True)
    items = list(reader.read(range(len(SIZES))))
    assert [item.index for item in items if isinstance(item, Example)] == [1, 2, 3, 4, 5, 6]


def test_images_of_other_sizes_classes_and_number_are_scored_by_the_same_programs(sd3, tmp_path):
    sd3 = replace(sd3, _conditioning=PromptCache())  # which knows no prompt yet
    settings = Settings(blocks=(0,), steps=(8,), seeds=(0,), batch_size=4)
    first = write_images(tmp_path / "first", [(100, 120), (70, 65), (128, 128), (90, 90)])
    evaluate(sd3, folder_benchmark(first), settings)
    before = len(COMPILATIONS)
    # Six, so that the last batch is short.
    second = write_images(tmp_path / "second", [(66, 80), (127, 65), (99, 100), (80, 128), (65, 66), (128, 70)], seed=9)
    evaluate(sd3, folder_benchmark(second), Settings(blocks=(0,), steps=(2,), seeds=(7, 8), batch_size=4))
    assert len(COMPILATIONS) == before
    third = write_images(tmp_path / "third", [(200, 100), (300, 310), (65, 500), (20, 30)], crowded=1)
    evaluate(sd3, folder_benchmark(third), settings)
    # A canvas and more rows of classes: adding, counting and the guessers, none of it the models.
    assert len(COMPILATIONS) - before <= 8


def test_matrices_that_would_overflow_on_the_device_are_summed_up_on_the_host(sd3, benchmark, monkeypatch):
    _, batch = one_batch(sd3, benchmark, 8)
    scores = jax.random.uniform(jax.random.key(0), (1, 8, batch.class_of_row.shape[1], 16))
    once = Tally(1, len(NAMES))
    once.count([(scores, PAPERS_MASKS)], (4, 4), batch)
    monkeypatch.setattr(zero_shot, "MOST_COUNTED", batch.truth.size + 1)
    thrice = Tally(1, len(NAMES))
    for _ in range(3):
        thrice.count([(scores, PAPERS_MASKS)], (4, 4), batch)
    assert thrice._host.any(), "nothing was summed up before the end"
    np.testing.assert_array_equal(thrice.total(), 3 * once.total())
    assert thrice.total().dtype == np.int64


def test_scores_that_are_not_finite_are_an_error_and_no_result(sd3, benchmark):
    _, batch = one_batch(sd3, benchmark, 8)
    counting = ZeroShot(Forward(sd3, (Readout(0),)), len(NAMES), steps=[8], seeds=[0])
    scores = jnp.zeros((1, 8, batch.class_of_row.shape[1], 16)).at[0, 2, 0, 3].set(jnp.nan)
    right = counting.tallies[Pass(8, 0)].count([(scores, PAPERS_MASKS)], (4, 4), batch)
    assert np.flatnonzero(np.asarray(right)[0] < 0).tolist() == [2]
    with pytest.raises(FloatingPointError, match="step 8 are not finite"):
        counting._keep([(Pass(8, 0), 7, right)])


# ---- what guessing scores -------------------------------------------------------------------------------------------


def test_random_scores_give_each_class_present_an_equal_part_of_every_class():
    images, rows, classes, side = 256, 8, 4, 32
    truth = np.tile(np.repeat(np.arange(classes), side // classes).astype(np.uint8), (images, side, 1))
    class_of_row = np.full((images, rows), 255, np.int32)
    class_of_row[:, :classes] = np.arange(classes)
    _, random = without_images(jnp.zeros((2, images, rows, 64)), np.arange(images, dtype=np.int32), 3)
    sizes = np.full((images, 2), side, np.int32)
    before, none = jnp.zeros((1, 1, classes, classes), jnp.int32), (np.zeros(0, np.float32), np.int32(-1))
    confusion, _ = count(before, random, truth, sizes, class_of_row, *none, grid=(8, 8))
    np.testing.assert_allclose(np.asarray(confusion)[0, 0] / (images * side**2 / classes), 1 / classes, atol=0.03)


def test_permuted_scores_are_the_same_numbers_elsewhere_and_the_same_for_all_classes_of_an_image():
    scores = jax.random.uniform(jax.random.key(1), (2, 3, 8, 64))
    permuted, _ = (np.asarray(each) for each in without_images(scores, np.arange(3, dtype=np.int32), 0))
    for image in range(3):
        order = [int(np.flatnonzero(np.asarray(scores)[0, image, 0] == value)[0]) for value in permuted[0, image, 0]]
        assert order != sorted(order)
        np.testing.assert_array_equal(permuted[:, image], np.asarray(scores)[:, image][..., order])
    assert not np.array_equal(permuted[0, 0].argsort(-1), permuted[0, 1].argsort(-1))


def test_a_constant_choice_is_counted_as_if_every_image_were_of_one_class():
    draw = np.random.default_rng(0)
    histograms = draw.integers(1, 50, (30, 5)) * (draw.random((30, 5)) < 0.6)
    histograms[:, 4] += histograms.sum(axis=1) == 0
    commonest = histograms.sum(axis=0)
    expected = np.zeros((5, 5), np.int64)
    for histogram in histograms:
        chosen = max(np.flatnonzero(histogram), key=lambda label: commonest[label])
        for label in range(5):
            expected[label, chosen] += histogram[label]
    np.testing.assert_array_equal(constant_choices(histograms)["commonest"], expected)


def test_every_baseline_is_measured_on_the_same_pixels(evaluation, benchmark):
    names = [row.baseline for row in evaluation.baselines]
    assert names == ["constant", "random", "permuted", "permuted"]
    for row in evaluation.baselines:
        assert row.images.images == len(SIZES)
        scored = {name for name, score in row.metrics.iou.items() if score is not None}
        assert scored == {name for name, score in evaluation.rows[0].metrics.iou.items() if score is not None}


# ---- scenes, and the command ----------------------------------------------------------------------------------------


def test_synthetic_scenes_are_written_once_and_tell_things_from_stuffs(tmp_path):
    benchmark = scenes_benchmark(3, 48, cache=tmp_path)
    assert len(benchmark.source) == 3
    assert benchmark.classes == CLASSES
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    scenes_benchmark(3, 48, cache=tmp_path)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    confusion = np.zeros((len(CLASSES),) * 2, np.int64)
    np.fill_diagonal(confusion[: len(THINGS)], 1)
    confusion[len(THINGS) :, 0] = 1
    row = metrics(confusion, benchmark)
    things = (len(THINGS) - 1 + 1 / (1 + len(STUFFS))) / len(THINGS)
    assert (row.groups["things"], row.groups["stuffs"]) == pytest.approx((100 * things, 0), abs=1e-3)


@pytest.fixture(scope="module")
def results(sd3_checkpoint, root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results") / "out"
    options = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", "0,2..3", "--steps", "4"]
    assert main([*options, "--seeds", "0,1", "--batch-size", "4", "--pictures", "3", "--out", str(out)]) == 0
    return out


def test_results_have_a_row_for_each_block_step_and_seed(results):
    contents = json.loads((results / "results.json").read_text())
    settings = [(row["block"], row["step"], row["seed"]) for row in contents["rows"]]
    assert sorted(settings) == [(block, 4, seed) for block in (0, 2, 3) for seed in (0, 1)]
    wanted = {"dataset", "protocol", "prompts", "block", "step", "seed", "images", "miou", "pixel_accuracy"}
    wanted |= {"mean_accuracy", "accuracy", "pixels", "cut_off", "list", "unlabelled", "unlabelled_images"}
    wanted |= {"things", "stuffs", "seconds", "images_per_second"}
    assert all(wanted <= set(row) for row in contents["rows"])
    assert {row["dataset"] for row in contents["rows"]} == {"varied"}
    assert contents["rows"][0]["things"] is None, "nobody said which of these classes are things"
    for row in contents["rows"]:
        by_class = [each for each in row["accuracy"].values() if each is not None]
        assert row["mean_accuracy"] == pytest.approx(np.mean(by_class), abs=1e-3)
    assert "mACC" in (results / "report.html").read_text()
    with (results / "per_class.csv").open() as file:
        lines = list(csv.DictReader(file))
    first = [line for line in lines if (line["block"], line["seed"]) == ("0", "0")]
    row = contents["rows"][settings.index((0, 4, 0))]
    assert {line["class"]: float(line["accuracy"]) for line in first if line["accuracy"]} == {
        name: each for name, each in row["accuracy"].items() if each is not None
    }


def test_the_page_has_the_best_the_worst_and_a_random_image_inside_it(results):
    tables = {"per_class.csv", "confusion.csv"}
    assert {path.name for path in results.iterdir()} == {"config.yaml", "report.html", "results.json", *tables}
    page = (results / "report.html").read_text()
    for what in ("image", "truth", "prediction"):
        assert len(re.findall(rf'src="data:image/\w+;base64,[^"]+"[^>]* alt="{what}"', page)) == 3
    for title in ("The best", "At random", "The worst"):
        assert f"<h3>{title}</h3>" in page


def test_the_saved_configuration_is_resolved_and_runs_again_to_the_same_scores(results, tmp_path, capsys):
    config = yaml.safe_load((results / "config.yaml").read_text())
    assert (config["blocks"], config["steps"], config["dtype"]) == ([0, 2, 3], [4], "float32")
    assert main(["--config", str(results / "config.yaml"), "--out", str(tmp_path / "again"), "--pictures", "0"]) == 0
    scores = [
        [row["miou"] for row in json.loads((directory / "results.json").read_text())["rows"]]
        for directory in (results, tmp_path / "again")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    table = capsys.readouterr().out
    assert "block 3, noise level 4" in table
    assert "random classes (chance)" in table


def test_unusable_images_stop_the_run_by_name_or_are_skipped_and_counted(sd3_checkpoint, tmp_path, capsys):
    root = write_images(tmp_path / "set", SIZES[:4])
    (root / "images" / "1.png").write_bytes(b"")
    (root / "labels" / "2.png").unlink()
    Image.new("L", SIZES[3][::-1], 255).save(root / "labels" / "3.png")
    options = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", "0", "--seeds", "0"]
    options += ["--batch-size", "4", "--out", str(tmp_path / "out")]
    assert main(options) == 1
    assert re.search(
        r"error: image 2 of 4: .*images/1\.png: cannot be read .*--skip-unreadable", capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    assert main([*options, "--skip-unreadable"]) == 0
    told = capsys.readouterr().err
    assert "2 images skipped:" in told
    assert "1 image without a labelled pixel:" in told
    contents = json.loads((tmp_path / "out" / "results.json").read_text())
    assert contents["rows"][0]["images"] == 1
    assert [Path(message.split(":")[0]).name for message in contents["skipped"]] == ["1.png", "2.png"]


def test_the_best_block_and_noise_level_become_the_checkpoints_own(sd3_checkpoint, root, tmp_path):
    checkpoint = shutil.copytree(sd3_checkpoint, tmp_path / "sd3")
    options = ["--model", str(checkpoint), "--data.root", str(root), "--seeds", "0", "--pictures", "0"]
    out = tmp_path / "out"
    assert main([*options, "--blocks", "1,3", "--steps", "2,8", "--name-expert", "--out", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert f"batch_size: {len(SIZES)}\n" in (out / "config.yaml").read_text()  # not 16384 tokens, most of no image
    best = max(rows, key=lambda row: row["miou"])
    pipe = s4d.load(checkpoint)
    assert (pipe.expert_block, pipe.expert_step) == (best["block"], best["step"])
    assert main([*options, "--out", str(tmp_path / "again")]) == 0
    (row,) = json.loads((tmp_path / "again" / "results.json").read_text())["rows"]
    assert row["miou"] == pytest.approx(best["miou"], abs=1e-3)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_scenes_are_those_of_their_split(tmp_path, split):
    item = scenes_benchmark(1, 48, split, cache=tmp_path).source[0]
    np.testing.assert_array_equal(item["image"], scene(split, 0, 48).image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "6"], r"--blocks is 6: 6 is not one of 0\.\.5"),
        (["--blocks", "expert"], "does not say which block segments best: name block, 0 to 5"),
        (["--steps", "0"], r"--steps is 0: 0 is not one of 1\.\.28"),
        (["--seeds", "all"], "--seeds is 'all': expected numbers"),
        (["--batch-size", "0"], "--batch-size is 0: expected at least 1"),
        (["--data.root", "absent"], "absent: no such directory"),
    ],
)
def test_options_that_cannot_be_are_refused_before_weights_are_read(sd3_checkpoint, root, options, message, capsys):
    usual = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", "0"]
    assert main([*usual, *options]) == 1
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
