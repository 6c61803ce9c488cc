"""evaluate.py without names: figures against the whole procedure in plain NumPy and SciPy, image by image."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import seg4diff_jax as s4d
from seg4diff_jax.command_line.evaluate import main, merging_protocols
from seg4diff_jax.data.names import Background
from seg4diff_jax.evaluation import readouts as forward
from seg4diff_jax.evaluation.benchmarks import Benchmark, folder_benchmark, open_benchmark
from seg4diff_jax.evaluation.counts import Counts
from seg4diff_jax.evaluation.gallery import UNMATCHED, owners_of, shown_segments
from seg4diff_jax.evaluation.measurement import Measurement, Settings
from seg4diff_jax.evaluation.options import Data, Options, Unsupervised, parse, protocols, thresholds
from seg4diff_jax.evaluation.rows import Row, Setting
from seg4diff_jax.evaluation.run import Evaluation, evaluate
from seg4diff_jax.flow import image_noise
from seg4diff_jax.segmentation.grouping import THRESHOLD_GRIDS, THRESHOLDS
from seg4diff_jax.segmentation.unsupervised import MERGE_THRESHOLDS
from seg4diff_jax.segmentation.unsupervised_scores import UNSUPERVISED_PROTOCOLS, UnsupervisedProtocol
from tests.reference.adapters import RANK, factors, release_names, write_release
from tests.reference.inputs import SQUARE, VARIED, an_image
from tests.reference.label_files import label, picture
from tests.reference.ties import assert_same_labels, ignore, undecided
from tests.reference.unsupervised import (
    IGNORED,
    assert_clear,
    count_matches,
    distributions,
    labels_of,
    matched_segments,
    merged,
)

CLASSES = ("cat", "dog", "sky", "tree")
SIZES = [(40, 60), (50, 30), (64, 64)]
BLOCKS, SEED = (VARIED, 2), 5
GRID = (SQUARE // 16, SQUARE // 16)
HERE = (
    UnsupervisedProtocol(0.004),
    UnsupervisedProtocol(0.0204),
    UnsupervisedProtocol(0.0204, absent_classes=True),
    UnsupervisedProtocol(0.1, "token", "row", absent_classes=True),
    UnsupervisedProtocol(0.001, "token", "row", absent_classes=True),
)
"""Ours at two thresholds; then the release's, the last at one that leaves more segments than classes."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("set") / "patches"
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for number, (height, width) in enumerate(SIZES):
        patches = np.random.default_rng(number).choice([0, 1, 3, IGNORED], (4, 3)).astype(np.uint8)
        labels = np.kron(patches, np.ones((-(-height // 4), -(-width // 3)), np.uint8))[:height, :width]
        Image.fromarray(an_image(height, width, number)).save(root / "images" / f"{number}.png")
        Image.fromarray(labels).save(root / "labels" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def attention(sd3, whole) -> dict[tuple[int, int], list[np.ndarray]]:
    """By block and noise level, [image, tokens] of each image: the mean over heads."""
    benchmark, looks = folder_benchmark(whole), [(block, step) for block in BLOCKS for step in (8, 2)]
    found = {look: [attention_of(sd3, benchmark, index, *look) for index in range(len(SIZES))] for look in looks}
    for protocol in HERE:
        every = (distributions(one, protocol.minmax) for some in found.values() for one in some)
        assert_clear(protocol.threshold, *every)
    return found


@pytest.fixture(scope="module")
def root(whole, attention) -> Path:
    """Without the pixels that rounding can decide about: of the rest every run counts the same."""
    for index, size in enumerate(SIZES):
        every = [
            merged(some[index], protocol.threshold, protocol.minmax) for some in attention.values() for protocol in HERE
        ]
        ties = np.any([undecided(maps.reshape(-1, *GRID), size) for maps in every], axis=0)
        ignore(whole / "labels" / f"{index}.png", ties, few=0.1)  # of twenty readings
    return whole


@pytest.fixture(scope="module")
def evaluation(sd3, root) -> Evaluation:
    settings = Settings(BLOCKS, (8, 2), (SEED,), batch_size=2, prompts=(), unsupervised=HERE)
    return evaluate(sd3, folder_benchmark(root), settings, shown=2)


def row_of(rows: list[Row], protocol: UnsupervisedProtocol, block: int, step: int) -> Row:
    (found,) = [row for row in rows if (row.merging, row.block, row.step) == (protocol, block, step)]
    return found


def attention_of(pipe: s4d.Pipeline, benchmark: Benchmark, index: int, block: int, step: int) -> np.ndarray:
    """[image, tokens], the mean over heads."""
    noise = np.asarray(image_noise(SEED, [index], (SQUARE // 8, SQUARE // 8, 16)))[0]
    image, how = benchmark.source[index]["image"], {"size": (SQUARE, SQUARE), "noise": noise, "step": step}
    probs = pipe.attention(image, "", blocks=block, **how)[block].probs
    assert probs is not None
    return np.asarray(probs)[0].mean(axis=0)


@pytest.mark.parametrize(("block", "step"), [(BLOCKS[0], 8), (BLOCKS[1], 2)])
def test_figures_are_those_of_the_procedure_in_plain_loops(attention, root, evaluation, block, step):
    benchmark = folder_benchmark(root)
    for protocol in HERE:
        counts, numbers = np.zeros((3, len(CLASSES)), int), []
        for index, one in enumerate(attention[block, step]):
            labels = benchmark.source[index]["labels"]
            segments = merged(one, protocol.threshold, protocol.minmax)
            found = labels_of(segments, GRID, labels.shape)
            own = count_matches(labels, found, len(CLASSES), protocol.match, protocol.absent_classes)
            counts += np.array([own.hits, own.false, own.missed])
            numbers.append(len(segments))
        hits, union = counts[0], counts.sum(axis=0)
        row = row_of(evaluation.rows, protocol, block, step)
        iou = row.metrics.iou
        assert [name for name in CLASSES if iou[name] is None] == [CLASSES[i] for i in np.flatnonzero(union == 0)]
        assert row.metrics.miou == pytest.approx(100 * (hits / np.maximum(union, 1))[union > 0].mean(), abs=1e-3)
        assert row.metrics.pixel_accuracy == pytest.approx(100 * hits.sum() / (counts[0] + counts[2]).sum(), abs=1e-3)
        assert row.segments == pytest.approx(np.mean(numbers), abs=0.01)
        assert (row.images.images, row.protocol, row.prompts) == (len(SIZES), "unsupervised", "empty")


def test_one_pass_serves_all_blocks_and_protocols_and_makes_a_row_for_each(evaluation):
    assert len(evaluation.rows) == 2 * len(BLOCKS) * len(HERE)
    assert len({row.seconds for row in evaluation.rows}) == 1
    assert evaluation.best.prompts == "empty"
    best = max(evaluation.rows, key=lambda row: row.metrics.miou)
    assert (evaluation.best.block, evaluation.best.step) == (best.block, best.step)
    assert not evaluation.shown, "nothing was asked for by its name"
    assert [one.why for one in evaluation.divided] == ["best", "worst"]


def test_the_transformer_runs_once_for_each_batch_and_look_whatever_is_tried(sd3, root, monkeypatch):
    run, batches = forward.attention_maps, []
    monkeypatch.setattr(forward, "attention_maps", lambda *a, **k: batches.append(0) or run(*a, **k))
    settings = Settings((VARIED,), (8, 2), (SEED,), batch_size=2, prompts=(), unsupervised=HERE)
    evaluate(sd3, folder_benchmark(root), settings)
    assert len(batches) == 2 * 2


OTHERS = {"diffseg": (0.006, 0.008), "diffcut": (0.4, 0.5)}


@pytest.mark.parametrize("grouping", OTHERS)
def test_other_groupings_score_the_pipelines_segments_from_one_pass_for_each_batch(sd3, root, grouping, monkeypatch):
    benchmark, every = folder_benchmark(root), range(len(SIZES))
    noises = [np.asarray(image_noise(SEED, [index], (SQUARE // 8, SQUARE // 8, 16)))[0] for index in every]
    how = {"block": VARIED, "step": 8, "size": (SQUARE, SQUARE), "grouping": grouping}

    def segmented(threshold: float) -> list[s4d.UnsupervisedSegmentation]:
        images = [benchmark.source[index]["image"] for index in every]
        return sd3.segment_unsupervised(images, noise=np.stack(noises), threshold=threshold, **how)

    def steady(wanted: float) -> float:
        """A threshold near the one that is wanted, at which rounding does not decide what merges."""
        counts = lambda threshold: [one.segments for one in segmented(threshold)]
        some = (wanted * (1 + 0.004 * step) for step in range(20))
        return next(each for each in some if counts(0.999 * each) == counts(each) == counts(1.001 * each))

    few, more = (UnsupervisedProtocol(steady(wanted), grouping=grouping) for wanted in OTHERS[grouping])
    protocols = few, replace(more, match="row", absent_classes=True)
    run, batches = forward.image_vectors, []
    monkeypatch.setattr(forward, "image_vectors", lambda *a, **k: batches.append(0) or run(*a, **k))
    settings = Settings((VARIED,), (8,), (SEED,), batch_size=2, prompts=(), unsupervised=protocols)
    found = evaluate(sd3, benchmark, settings, shown=1)
    assert len(batches) == 2 + 1, "two batches, and one to be shown"
    for protocol in protocols:
        expected, counts = segmented(protocol.threshold), np.zeros((3, len(CLASSES)), int)
        for index, one in enumerate(expected):
            labels = benchmark.source[index]["labels"]
            own = count_matches(labels, one.labels, len(CLASSES), protocol.match, protocol.absent_classes)
            counts += np.array([own.hits, own.false, own.missed])
        row = row_of(found.rows, protocol, VARIED, 8)
        assert row.segments == pytest.approx(np.mean([one.segments for one in expected]), abs=0.01)
        assert row.segments > 1
        assert row.metrics.pixel_accuracy == pytest.approx(100 * counts[0].sum() / counts[[0, 2]].sum(), abs=0.2)
        permuted = row_of([one for one in found.baselines if one.baseline == "permuted"], protocol, VARIED, 8)
        assert permuted.segments == row.segments
        assert row.plain()["grouping"] == grouping


def test_batches_of_any_size_score_alike(sd3, root, evaluation):
    settings = Settings((VARIED,), (8,), (SEED,), batch_size=3, prompts=(), unsupervised=HERE)
    for row in evaluate(sd3, folder_benchmark(root), settings).rows:
        expected = row_of(evaluation.rows, row.merging, VARIED, 8)
        assert (row.metrics, row.segments) == (expected.metrics, expected.segments)


def test_attention_that_is_not_finite_is_told(sd3, root, monkeypatch):
    run = forward.attention_maps
    monkeypatch.setattr(forward, "attention_maps", lambda *a, **k: run(*a, **k).at[0, 0, 0].set(np.nan))
    settings = Settings((VARIED,), (8,), (SEED,), batch_size=2, prompts=(), unsupervised=HERE)
    with pytest.raises(FloatingPointError, match="attention is not finite"):
        evaluate(sd3, folder_benchmark(root), settings)


@pytest.fixture(scope="module")
def counted(sd3, root) -> tuple[Measurement, Counts]:
    settings = Settings(BLOCKS, (8,), (SEED,), batch_size=2, prompts=(), unsupervised=HERE)
    measurement = Measurement(sd3, folder_benchmark(root), settings)
    return measurement, measurement.outcome()


@pytest.mark.parametrize(("protocol", "block"), [(HERE[0], BLOCKS[1]), (HERE[1], BLOCKS[0]), (HERE[4], BLOCKS[1])])
def test_shown_segments_have_the_classes_that_scipy_matches_them_with(attention, counted, protocol, block):
    measurement, outcome = counted
    shown = shown_segments(measurement, outcome, Setting(block, 8, "empty", protocol.threshold), len(SIZES))
    assert sorted(one.example.index for one in shown) == list(range(len(SIZES)))
    assert max(one.segments.max() for one in shown) > 2
    for one in shown:
        maps = merged(attention[block, 8][one.example.index], protocol.threshold, protocol.minmax)
        truth = measurement.benchmark.source[one.example.index]["labels"]
        segments = labels_of(maps, GRID, truth.shape)
        assert_same_labels(one.segments, segments, maps.reshape(-1, *GRID), few=0.02)
        expected = matched_segments(truth.ravel(), one.segments.ravel(), len(CLASSES), protocol.absent_classes)
        owners = {int(owner): segment for segment, owner in enumerate(one.owners) if owner != UNMATCHED}
        assert owners == {owner: segment for owner, segment in expected.items() if segment <= one.segments.max()}
        matches = count_matches(truth, segments, len(CLASSES), protocol.match, protocol.absent_classes)
        assert one.accuracy == pytest.approx(100 * matches.hits.sum() / (truth != IGNORED).sum(), abs=1e-3)
    accuracy = {one.why: one.accuracy for one in shown}
    assert accuracy["best"] >= accuracy["random"] >= accuracy["worst"]


@pytest.mark.parametrize("absent_classes", [False, True])
def test_segments_that_no_class_is_left_for_have_none(absent_classes):
    draw = np.random.default_rng(1)
    segments = np.kron(draw.permutation(12).reshape(3, 4), np.ones((5, 5), int)).astype(np.int32)
    truth = np.where(draw.random((15, 20)) < 0.2, IGNORED, segments % 3).astype(np.uint8)
    owners = owners_of(truth, segments, len(CLASSES), absent_classes=absent_classes)
    expected = matched_segments(truth.ravel(), segments.ravel(), len(CLASSES), absent_classes)
    assert {int(owners[segment]): segment for segment in np.flatnonzero(owners != UNMATCHED)} == expected
    assert (owners == UNMATCHED).sum() == 12 - (len(CLASSES) if absent_classes else 3)


def test_guessers_are_matched_as_segments_are(evaluation, root):
    (whole,) = [row for row in evaluation.baselines if row.baseline == "one_segment"]
    labels = [folder_benchmark(root).source[index]["labels"] for index in range(len(SIZES))]
    commonest = [np.bincount(each[each != IGNORED], minlength=len(CLASSES)) for each in labels]
    right, labelled = sum(each.max() for each in commonest), sum(each.sum() for each in commonest)
    assert whole.metrics.pixel_accuracy == pytest.approx(100 * right / labelled, abs=1e-3)
    for protocol in HERE:
        permuted = [row for row in evaluation.baselines if row.baseline == "permuted"]
        permuted = row_of(permuted, protocol, VARIED, 8)
        own = row_of(evaluation.rows, protocol, VARIED, 8)
        assert permuted.segments == own.segments, "as many segments, in random places"
        assert permuted.metrics.iou != own.metrics.iou or own.segments < 2


@pytest.fixture(scope="module")
def out(sd3_checkpoint, root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results") / "out"
    options = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", f"{BLOCKS[0]},{BLOCKS[1]}"]
    options += ["--steps", "8,2", "--seeds", str(SEED), "--batch-size", "2", "--pictures", "1"]
    options += ["--protocol", "open_vocabulary,unsupervised", "--unsupervised.threshold", "0.004,0.0204"]
    assert main([*options, "--out", str(out)]) == 0
    return out


def test_both_protocols_from_one_command_are_reported_apart_with_the_figures_of_each_alone(out, evaluation):
    contents = json.loads((out / "results.json").read_text())
    kinds = [row["protocol"] for row in contents["rows"]]
    assert (kinds.count("open_vocabulary"), kinds.count("unsupervised")) == (4, 8)
    assert contents["best"].keys() == {"block", "step", "prompts"}
    assert contents["best"]["prompts"] == "present"
    without = [row for row in contents["rows"] if row["protocol"] == "unsupervised"]
    for protocol in HERE[:2]:
        for block in BLOCKS:
            for step in (8, 2):
                theirs = row_of(evaluation.rows, protocol, block, step).plain()
                place = asdict(protocol) | {"block": block, "step": step}
                (ours,) = [row for row in without if place.items() <= row.items()]
                assert all(ours[name] == theirs[name] for name in ("miou", "pixel_accuracy", "segments", "iou"))
    guesses = {(row["protocol"], row["baseline"]) for row in contents["baselines"]}
    assert guesses >= {("unsupervised", "one_segment"), ("unsupervised", "permuted"), ("open_vocabulary", "random")}


def test_what_is_written_tells_thresholds_apart_and_the_configuration_is_resolved(out):
    with (out / "per_class.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["threshold"] for line in lines].count("0.0204") == 4 * len(CLASSES)
    assert {line["threshold"] for line in lines if line["protocol"] == "open_vocabulary"} == {""}
    page = (out / "report.html").read_text()
    assert re.findall("<h2>(Images .*)</h2>", page) == [
        "Images asked for the classes present",
        "Images divided into segments without names",
    ]
    assert page.count("<article") == 2, "one of each"
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["protocol"] == ["open_vocabulary", "unsupervised"]
    expected = {"threshold": [0.004, 0.0204], "minmax": "pixel", "match": "image", "absent_classes": False}
    assert config["unsupervised"] == expected | {"grouping": "pads"}
    again = parse(["--config", str(out / "config.yaml")])
    assert merging_protocols(again, protocols(again.protocol)) == HERE[:2]


# ---- options --------------------------------------------------------------------------------------------------------


def test_a_grid_tries_thresholds_that_rise_evenly_and_the_table_has_them_all(
    sd3_checkpoint, root, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    options = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", str(VARIED), "--pictures", "0"]
    options += ["--seeds", str(SEED), "--batch-size", "2", "--protocol", "unsupervised"]
    assert main([*options, "--unsupervised.threshold", "grid", "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    tried = np.array([row["threshold"] for row in rows])
    assert (len(tried), tried[0], tried[-1]) == (23, 0.0001, 0.2)
    np.testing.assert_allclose(tried[1:] / tried[:-1], 2**0.5, rtol=0.05)
    printed = re.findall(r"threshold ([\d.]+),.*?([\d.]+) *│? *$", capsys.readouterr().out, re.MULTILINE)
    assert [(float(threshold), float(segments)) for threshold, segments in printed] == [
        (row["threshold"], pytest.approx(row["segments"], abs=0.051)) for row in rows
    ]
    assert np.diff([row["segments"] for row in rows]).max() <= 0, "the larger, the fewer segments"


def test_lists_of_thresholds_are_read_as_they_are_written():
    for value in ("0.5, 0.25", [0.5, 0.25]):
        assert thresholds(value, "--unsupervised.threshold") == (0.5, 0.25)
    assert thresholds(0.5, "--unsupervised.threshold") == (0.5,)


def test_options_make_ours_and_the_releases_protocols():
    assert merging_protocols(Options(), ("open_vocabulary",)) == ()
    chosen = lambda **options: merging_protocols(Options(unsupervised=Unsupervised(**options)), ("unsupervised",))
    assert chosen() == (UNSUPERVISED_PROTOCOLS["ours"],)
    assert chosen(minmax="token")[0].threshold == MERGE_THRESHOLDS["token"]
    for grouping in ("diffseg", "diffcut"):
        assert chosen(grouping=grouping) == (UnsupervisedProtocol(THRESHOLDS[grouping], grouping=grouping),)
        assert [one.threshold for one in chosen(grouping=grouping, threshold="grid")] == [*THRESHOLD_GRIDS[grouping]]
    release = {"minmax": "token", "match": "row", "absent_classes": True}
    assert chosen(threshold="0.035,0.1", **release) == (
        UNSUPERVISED_PROTOCOLS["release_config"],
        UNSUPERVISED_PROTOCOLS["release"],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "both"], "--protocol is 'both': expected open_vocabulary, unsupervised, or"),
        (["--protocol", "unsupervised", "--unsupervised.threshold", "0"], "--unsupervised.threshold is 0.0: expected"),
        (["--protocol", "unsupervised", "--unsupervised.threshold", "0.1,x"], "expected numbers above 0, each once"),
        (["--protocol", "unsupervised", "--unsupervised.threshold", "0.1,0.1"], "each once"),
        (
            ["--protocol", "unsupervised", "--unsupervised.grouping", "diffcut", "--unsupervised.threshold", "1"],
            "expected numbers above 0 and below 1, each once, as in 0.5,0.6, or grid",
        ),
        (
            ["--protocol", "unsupervised", "--unsupervised.grouping", "diffseg", "--unsupervised.minmax", "token"],
            "minmax is 'token', which is of the grouping pads alone",
        ),
        (["--unsupervised.match", "row"], "--unsupervised.match is 'row', but --protocol is 'open_vocabulary'"),
        (["--unsupervised.absent-classes"], "--unsupervised.absent-classes is True, but --protocol"),
        (["--lora", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_options_that_cannot_be_are_refused(sd3_checkpoint, root, options, message, tmp_path, capsys):
    usual = ["--model", str(sd3_checkpoint), "--data.root", str(root), "--blocks", "0", "--out", str(tmp_path / "out")]
    assert main([*usual, *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["", "unsupervised,unsupervised", "unsupervised open_vocabulary"])
def test_protocols_are_one_or_both(wrong):
    assert protocols("open_vocabulary, unsupervised") == ("open_vocabulary", "unsupervised")
    with pytest.raises(ValueError, match="--protocol is"):
        protocols(wrong)


@pytest.mark.parametrize(
    ("measured", "chosen", "rule"),
    [
        ("open_vocabulary", None, "ignored"),
        ("unsupervised", None, "scored"),
        ("unsupervised", "ignored", "ignored"),
        ("unsupervised,open_vocabulary", "scored", "scored"),
    ],
)
def test_background_is_a_segment_to_find_unless_it_is_ignored(tmp_path, measured, chosen: Background | None, rule):
    picture(tmp_path / "val2017/000000000001.jpg", (64, 64))
    label(tmp_path / "stuffthingmaps/val2017/000000000001.png", np.zeros((64, 64), np.uint8))
    data = Data(name="coco-object", root=str(tmp_path), background=chosen)
    assert open_benchmark(data, 64, protocols(measured)).rule == rule


@pytest.mark.parametrize(
    ("measured", "chosen", "message"),
    [
        ("unsupervised", "asked", "unsupervised asks for nothing: give scored or ignored"),
        ("open_vocabulary,unsupervised", None, "ignored by open_vocabulary and scored by unsupervised"),
    ],
)
def test_protocols_that_would_count_other_pixels_are_measured_one_after_the_other(
    tmp_path, measured, chosen: Background | None, message
):
    picture(tmp_path / "val2017/000000000001.jpg", (64, 64))
    label(tmp_path / "stuffthingmaps/val2017/000000000001.png", np.zeros((64, 64), np.uint8))
    with pytest.raises(ValueError, match=message):
        open_benchmark(Data(name="coco-object", root=str(tmp_path), background=chosen), 64, protocols(measured))


# ---- adapters -------------------------------------------------------------------------------------------------------


def merged_checkpoint(source: Path, target: Path, adapters: dict[str, torch.Tensor], scale: float) -> Path:
    shutil.copytree(source, target)
    (file,) = (target / "transformer").glob("*.safetensors")
    weights = load_file(file)
    for name, down in adapters.items():
        if name.endswith("lora_A.weight"):
            up = adapters[name.replace("lora_A", "lora_B")]
            weights[name.replace("lora_A.", "")] += scale * up @ down
    save_file(weights, file)
    return target


def test_adapters_change_scores_into_those_of_a_checkpoint_that_they_are_merged_into(
    sd3, sd3_checkpoint, whole, tmp_path
):
    adapters = factors()
    file = write_release(tmp_path / "lora_weights.pth", release_names(adapters))
    pipe = s4d.load(merged_checkpoint(sd3_checkpoint, tmp_path / "merged", adapters, 16 / RANK))
    root, benchmark = shutil.copytree(whole, tmp_path / "set"), folder_benchmark(whole)
    for index, size in enumerate(SIZES):
        maps = attention_of(pipe, benchmark, index, 2, 8)
        assert_clear(0.0204, distributions(maps, "pixel"))
        image, present = benchmark.source[index]["image"], np.unique(benchmark.source[index]["labels"])
        names = [CLASSES[label] for label in present if label != IGNORED]
        noise = np.asarray(image_noise(SEED, [index], (SQUARE // 8, SQUARE // 8, 16)))
        scores = pipe.segment(image, names, block=2, step=8, size=(SQUARE, SQUARE), noise=noise).scores
        ties = undecided(scores, size) | undecided(merged(maps, 0.0204, "pixel").reshape(-1, *GRID), size)
        ignore(root / "labels" / f"{index}.png", ties, few=0.02)
    options = ["--model", str(sd3_checkpoint), "--lora", str(file), "--data.root", str(root), "--blocks", "2"]
    options += ["--steps", "8", "--seeds", str(SEED), "--batch-size", "2", "--protocol", "open_vocabulary,unsupervised"]
    assert main([*options, "--unsupervised.threshold", "0.0204", "--out", str(tmp_path / "out")]) == 0
    contents = json.loads((tmp_path / "out/results.json").read_text())
    assert contents["config"]["lora"] == str(file)
    assert {row["lora"] for row in contents["rows"]} == {str(file)}
    settings = Settings((2,), (8,), (SEED,), batch_size=2, unsupervised=HERE[1:2])
    found = [evaluate(pipe, folder_benchmark(root), settings) for pipe in (pipe, sd3)]
    assert not any(one.shown or one.divided for one in found), "pictures are made when they are asked for"
    expected, plain = ([row.plain() for row in one.rows] for one in found)
    accuracy = lambda rows: [row["pixel_accuracy"] for row in rows]
    assert accuracy(contents["rows"]) == pytest.approx(accuracy(expected), abs=1e-3)
    for ours, without in zip(contents["rows"], plain, strict=True):
        assert abs(ours["pixel_accuracy"] - without["pixel_accuracy"]) > 0.5
