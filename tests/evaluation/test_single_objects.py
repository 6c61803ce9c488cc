"""Sets with one named object in each image are scored as images segmented one by one, in the published code's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score

from seg4diff_jax.checkpoints import load
from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.evaluation.benchmarks import Benchmark, open_benchmark
from seg4diff_jax.evaluation.counts import Counts
from seg4diff_jax.evaluation.measurement import Measurement, Settings
from seg4diff_jax.evaluation.options import BackgroundOptions, Data
from seg4diff_jax.evaluation.resumption import Progress
from seg4diff_jax.flow import image_noise
from seg4diff_jax.miniature.world.shapes import CLASSES, THINGS, scene
from seg4diff_jax.passes import encode_images
from tests.reference.label_files import label, text
from tests.reference.matlab_file import Record, write_matlab
from tests.reference.processes import QUICK_TO_COMPILE, flags

ROOT = Path(__file__).parents[2]
IMAGES, SIZE, SIDE = 7, 64, 224
COMPETITORS = ("grass", "sky")
BLOCK, STEP, SEED = 3, 3, 5
OPTIONS = ["--blocks", str(BLOCK), "--steps", str(STEP), "--seeds", str(SEED), "--batch-size", "2"]
OPTIONS += ["--metrics", "average_precision"]


def objects() -> list[tuple[str, Record]]:
    """The largest thing in each scene, of images of several shapes. Its class has an id of ImageNet's kind."""
    found = []
    for index in range(IMAGES):
        shown = scene("validation", index, SIZE)
        sizes = np.bincount(shown.labels.ravel(), minlength=256)[: len(THINGS)]
        cut = slice(0, SIZE - 8 * (index % 3))
        thing = int(sizes.argmax())
        mask = (shown.labels == thing)[cut]
        found.append((CLASSES[thing], Record(shown.image[cut], mask, f"n{thing:08d}_{index}")))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("set")
    write_matlab(root / "gtsegs_ijcv.mat", [record for _, record in objects()])
    text(root / "words.txt", [f"n{index:08d}\t{name}, some thing" for index, name in enumerate(CLASSES)])
    return root


@pytest.fixture(scope="module")
def pipe():
    return load("miniature", blocks=4)


def maps(pipe, image: np.ndarray, index: int, names: Sequence[str]) -> torch.Tensor:
    """Maps of an image that is segmented by itself, enlarged to the square: float64 [names, side, side]."""
    side = pipe.trained_size
    latents = encode_images(pipe.vae, jnp.zeros((1, side, side, 3)))
    noise = np.asarray(image_noise(SEED, [index], latents.shape[1:]))[0]
    found = pipe.segment(image, [*names], block=BLOCK, step=STEP, noise=noise, size=(side, side))
    return F.interpolate(torch.tensor(found.scores).double()[None], (SIDE, SIDE), mode="bilinear")[0]


def squared(values: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST))


def published(each: Sequence[torch.Tensor], masks: Sequence[np.ndarray], *, by_mean: bool) -> dict[str, float]:
    """Figures in percent, as the published code adds them up; an object is the first map of its image."""
    right = pixels = 0
    both, either, precision = np.zeros(2), np.zeros(2), []
    for scores, mask in zip(each, masks, strict=True):
        truth = squared(mask) == 1
        own = (scores[0] - scores[0].min()) / (scores[0].max() - scores[0].min())
        found = (own > own.mean() if by_mean else scores.argmax(dim=0) == 0).numpy()
        right, pixels = right + (found == truth).sum(), pixels + truth.size
        for place, (said, true) in enumerate(((found, truth), (~found, ~truth))):
            both[place] += (said & true).sum()
            either[place] += (said | true).sum()
        channels = torch.stack([1 - own.float(), own.float()]).numpy()
        precision.append(average_precision_score(np.stack([~truth, truth]).ravel(), channels.ravel()))
    return {
        "pixel_accuracy": 100 * right / pixels,
        "miou": 100 * np.mean(both / either),
        "average_precision": 100 * np.mean(precision),
    }


WAYS = {
    "the word background": ([], ("background",), False),
    "competitors": ([f"--background.competitors={','.join(COMPETITORS)}"], COMPETITORS, False),
    "the mean": (["--background.threshold", "mean"], (), True),
    "the mean beside competitors": (
        ["--background.threshold", "mean", f"--background.competitors={','.join(COMPETITORS)}"],
        COMPETITORS,
        True,
    ),
}


@pytest.mark.filterwarnings("ignore::seg4diff_jax.class_names.OneClassWarning")
@pytest.mark.parametrize("way", WAYS)
def test_figures_are_those_of_images_segmented_one_by_one_in_the_published_codes_way(way, pipe, root, tmp_path):
    options, others, by_mean = WAYS[way]
    pictures = ["--pictures", "3" if by_mean else "0"]
    data = ["--data.name", "imagenet-segmentation", "--data.root", str(root)]
    assert main([*OPTIONS, *data, *options, *pictures, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    (row,) = results["rows"]
    each = [maps(pipe, one.image, index, [name, *others]) for index, (name, one) in enumerate(objects())]
    expected = published(each, [record.mask for _, record in objects()], by_mean=by_mean)
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=0.02), name
    assert (row["images"], row["pixels"]) == (IMAGES, IMAGES * SIDE**2)
    assert (row["threshold"], row["competitors"]) == (
        "mean" if by_mean else None,
        (options and others and [*others]) or [],
    )
    assert row["iou"].keys() == {"foreground", "background"}
    assert row["miou"] == pytest.approx(np.mean([*row["iou"].values()]), abs=1e-3)
    permuted = next(each for each in results["baselines"] if each["baseline"] == "permuted")
    assert permuted["average_precision"] < row["average_precision"]
    page = (tmp_path / "out/report.html").read_text()
    assert "mAP" in page
    if by_mean:
        assert page.count("data:image") > 3
        again = ["--config", str(tmp_path / "out/config.yaml"), "--overwrite", "--pictures", "0"]
        assert main(again) == 0
        (same,) = json.loads((tmp_path / "out/results.json").read_text())["rows"]
        assert {name: same[name] for name in expected} == {name: row[name] for name in expected}


def test_a_folder_of_the_same_images_has_the_same_figures(root, tmp_path, pipe):
    for name, record in objects():
        picture = tmp_path / f"set/images/{record.name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(record.image).save(picture)
        label(tmp_path / f"set/masks/{record.name}.png", record.mask * 255)
        with (tmp_path / "set/names.txt").open("a") as names:
            names.write(f"{record.name}\t{name}\n")
    ours, theirs = (counted(pipe, opened(where)) for where in (root, tmp_path / "set"))
    np.testing.assert_array_equal(ours.counted.confusion, theirs.counted.confusion)
    np.testing.assert_array_equal(ours.further.average_precision, theirs.further.average_precision)


def test_borders_of_voc_are_not_scored_and_images_of_several_classes_left_out(pipe, tmp_path):
    home, labels = tmp_path / "VOCdevkit/VOC2012", []
    for index, (_, record) in enumerate(objects()[:4]):
        values = np.where(record.mask, 8 if index else 15, 0)  # a person, then cats
        values[:5] = 255
        values[-1, -1] = 3 if index == 2 else values[-1, -1]
        labels.append(values)
        label(home / f"SegmentationClass/{index}.png", values, palette=True)
        (home / "JPEGImages").mkdir(exist_ok=True)
        Image.fromarray(record.image).save(home / f"JPEGImages/{index}.jpg", quality=95)
    text(home / "ImageSets/Segmentation/val.txt", ["0", "1", "2", "3"])
    background = BackgroundOptions(competitors=",".join(COMPETITORS))
    benchmark = open_benchmark(Data(name="voc-single", root=str(tmp_path)), SIZE, background=background)
    assert (benchmark.objects, benchmark.rule) == (("person", "cat", "cat"), "scored")
    found, right, pixels = counted(pipe, benchmark), 0, 0
    for place, index in enumerate((0, 1, 3)):
        scores = maps(pipe, benchmark.source[place]["image"], place, [benchmark.objects[place], *COMPETITORS])
        truth = squared(labels[index])
        own = ((scores[0] - scores[0].min()) / (scores[0].max() - scores[0].min())).float()
        scored, positive = truth != 255, np.stack([truth == 0, (truth != 0)])
        both = np.stack([scored, scored])
        expected = average_precision_score(positive[both], torch.stack([1 - own, own]).numpy()[both])
        assert found.further.average_precision[0, 0, place] == pytest.approx(expected, abs=1e-5)
        right += ((scores.argmax(dim=0).numpy() == 0) == (truth != 0))[scored].sum()
        pixels += scored.sum()
    (confusion,) = found.counted.confusion[0]
    assert confusion.sum() == pixels < 3 * SIDE**2
    assert np.trace(confusion) == pytest.approx(right, abs=5)


def test_a_list_chooses_images_and_their_names(root, tmp_path, pipe):
    chosen = [objects()[index] for index in (4, 1)]
    text(tmp_path / "list.txt", [record.name for _, record in chosen])
    benchmark = opened(root, list=str(tmp_path / "list.txt"))
    assert benchmark.objects == tuple(name for name, _ in chosen)
    found = counted(pipe, benchmark)
    assert found.further.average_precision.shape == (2, 1, 2), "the pass and its permuted maps, one readout, two images"


def opened(root: Path, **data) -> Benchmark:
    background = BackgroundOptions(competitors=",".join(COMPETITORS))
    return open_benchmark(Data(name="imagenet-segmentation", root=str(root), **data), SIZE, background=background)


def counted(pipe, benchmark: Benchmark, kept: Progress | None = None) -> Counts:
    settings = Settings((BLOCK,), (STEP,), (SEED,), 2, metrics=("average_precision",), shard_batches=1)
    return Measurement(pipe, benchmark, settings).outcome(kept=kept)


# ---- sittings and devices -------------------------------------------------------------------------------------------


def test_a_run_that_is_interrupted_ends_with_the_figures_of_one_that_is_not(root, pipe, tmp_path, monkeypatch):
    whole, kept, save = counted(pipe, opened(root)), Progress(tmp_path, {}), Progress.save

    def dying(self: Progress, number: int, outcome: Counts) -> None:
        save(self, number, outcome)
        if number == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        counted(pipe, opened(root), kept)
    monkeypatch.setattr(Progress, "save", save)
    resumed = counted(pipe, opened(root), Progress(tmp_path, {}))
    np.testing.assert_array_equal(resumed.further.average_precision, whole.further.average_precision)
    np.testing.assert_array_equal(resumed.counted.confusion, whole.counted.confusion)
    assert whole.further.average_precision.shape == (2, 1, IMAGES)


def test_eight_devices_have_the_figures_of_one(root, tmp_path):
    more = flags("--xla_force_host_platform_device_count=8", QUICK_TO_COMPILE)
    command = [sys.executable, "-m", "tests.reference.evaluation_run", "objects", str(root), str(tmp_path)]
    environment = os.environ | more | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=900)
    for way in "01":
        spread, alone = (Counts.from_bytes((tmp_path / f"{name}{way}").read_bytes()) for name in ("spread", "alone"))
        precision = spread.further.average_precision
        np.testing.assert_allclose(precision, alone.further.average_precision, atol=1e-5)
        moved = np.abs(spread.counted.confusion - alone.counted.confusion).sum()
        assert moved <= 1e-3 * IMAGES * SIDE**2, "pixels that tie within rounding"
        assert spread.counted.confusion.sum() == IMAGES * SIDE**2


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--prompts", "present,all"],
            "--prompts is 'present,all', but imagenet-segmentation asks for one name",
        ),
        (["--data.background", "ignored"], "data.background is 'ignored', but imagenet-segmentation's is half of the"),
        (["--data.resize", "paper"], "data.resize is 'paper', but imagenet-segmentation's labels are compared whole"),
        (["--background.threshold", "mean,0.1"], "--background.threshold is 'mean,0.1': expected numbers above 0"),
        (["--data.name", "scenes", "--metrics", "average_precision"], "scenes names no single object in each image"),
        (
            ["--data.name", "voc21", "--background.threshold", "mean"],
            "background.threshold is 'mean', the mean of one object's map: imagenet-segmentation, voc-single have",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_files_are_read(options, message, capsys, tmp_path):
    data = [] if "scenes" in options else ["--data.root", str(tmp_path / "nowhere")]
    assert main(["--data.name", "imagenet-segmentation", *data, *options, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_a_competitor_that_is_an_objects_name_is_refused(root):
    name, _ = objects()[0]
    data = Data(name="imagenet-segmentation", root=str(root))
    with pytest.raises(ValueError, match=f"background.competitors has '{name}', which is a class of imagenet-seg"):
        open_benchmark(data, SIZE, background=BackgroundOptions(competitors=name))


def test_objects_have_synonyms_by_their_names(root, tmp_path, pipe):
    (name, _), *_ = objects()
    text(tmp_path / "names.yaml", f"{name}: [first word, second word]\n")
    measurement = Measurement(pipe, opened(root, synonyms=str(tmp_path / "names.yaml")), Settings((3,), (3,), (5,), 2))
    rows, prompts = measurement.asked["present"](measurement.reader.example(0))
    assert rows == (0, 1, 1)
    assert prompts.prompts == (f"first word second word {' '.join(COMPETITORS)}",)
    text(tmp_path / "names.yaml", "zebra: horse\n")
    with pytest.raises(ValueError, match=r"names\.yaml names synonyms of 'zebra', which imagenet-segmentation has no"):
        opened(root, synonyms=str(tmp_path / "names.yaml"))


def test_unreadable_images_are_left_out_if_asked(root, tmp_path, pipe):
    records = [record for _, record in objects()]
    records[2] = records[2]._replace(mask=records[2].mask[:5])
    write_matlab(tmp_path / "gtsegs_ijcv.mat", records)
    (tmp_path / "words.txt").write_text((root / "words.txt").read_text())
    with pytest.raises(FolderError, match=r"image 3 of 7: .* \(n\d+_2\): the mask is 5 x 64 pixels .*--skip-unread"):
        counted(pipe, opened(tmp_path))
    settings = Settings((BLOCK,), (STEP,), (SEED,), 2, metrics=("average_precision",), skip_unreadable=True)
    found = Measurement(pipe, opened(tmp_path), settings).outcome()
    assert found.indices.tolist() == [0, 1, 3, 4, 5, 6]
    assert found.further.average_precision.shape == (2, 1, 6)
