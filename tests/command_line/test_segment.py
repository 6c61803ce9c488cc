"""`seg4diff` at the terminal: what it writes, what it prints, and how it says that something is wrong."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax import command_line
from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.command_line import main, segment
from seg4diff_jax.command_line.segment import output_directory, parse_size
from seg4diff_jax.flow import FlowSchedule
from seg4diff_jax.segmentation.mask_options import REFINED_MASKS
from tests.reference.ties import assert_same_labels

CLASSES = ["cat", "dog", "sky"]
BLOCK = 3


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "two words.png"
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What the run of `result` wrote to the terminal."""
    return {}


@pytest.fixture(scope="module")
def result(tmp_path_factory, image, sd3_checkpoint, printed) -> Path:
    out = tmp_path_factory.mktemp("out") / "new" / "result"
    options = ["--block", str(BLOCK), "--step", "10", "--seed", "3", "--size", "64x96", "--out", str(out)]
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        assert main(["segment", str(image), *CLASSES, "--model", str(sd3_checkpoint), *options]) == 0
    printed |= {"stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
    return out


@pytest.fixture(scope="module")
def expected(image, sd3_checkpoint) -> s4d.Segmentation:
    pipe = s4d.load(sd3_checkpoint, blocks=BLOCK + 1)
    return pipe.segment(image, CLASSES, block=BLOCK, step=10, seed=3, size=(64, 96))


# ---- results --------------------------------------------------------------------------------------------------------


def test_the_label_image_holds_the_pipelines_labels(result, expected):
    labels = Image.open(result / "labels.png")
    assert labels.mode == "P"
    assert_same_labels(np.asarray(labels), expected.labels, expected.scores, few=0.02)


def test_refined_masks_are_the_pipelines_and_their_stages_are_drawn(image, sd3_checkpoint, tmp_path, capsys):
    out, how = tmp_path / "refined", ["--block", "0", "--size", "64x96", "--seed", "3", "--refine"]
    command = ["segment", str(image), *CLASSES, "--model", str(sd3_checkpoint), *how, "--out", str(out)]
    assert main([*command, "--explain"]) == 0
    assert f"wrote {out / 'stages.png'}: what each step" in capsys.readouterr().err.replace("\n", "")
    pipe = s4d.load(sd3_checkpoint, blocks=1)
    expected = pipe.segment(image, CLASSES, block=0, seed=3, size=(64, 96), masks=REFINED_MASKS)
    with np.load(out / "scores.npz") as saved:
        np.testing.assert_allclose(saved["scores"], expected.scores, rtol=1e-4)
    assert json.loads((out / "segmentation.json").read_text())["masks"]["rounds"] == REFINED_MASKS.rounds
    names = [name for name, _ in REFINED_MASKS.stages()]
    assert names == ["the paper's masks", "balanced", "refined, 2 rounds", "edges"]
    assert [stage for _, stage in REFINED_MASKS.stages()][-1] == REFINED_MASKS
    assert main([*command, "--overwrite"]) == 0
    assert not (out / "stages.png").exists(), "of an earlier run"


def test_stages_are_of_refined_masks_alone(image, sd3_checkpoint, capsys):
    assert main(["segment", str(image), *CLASSES, "--model", str(sd3_checkpoint), "--explain"]) == 1
    assert "error: --explain shows what --refine does, which is not given" in capsys.readouterr().err


def test_the_scores_are_the_pipelines(result, expected):
    with np.load(result / "scores.npz") as saved:
        np.testing.assert_allclose(saved["scores"], expected.scores, rtol=1e-5)
        assert saved["classes"].tolist() == CLASSES


def test_without_a_noise_level_the_checkpoints_own_is_taken(image, sd3_checkpoint, tmp_path):
    checkpoint = shutil.copytree(sd3_checkpoint, tmp_path / "sd3")
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    named = config | {"expert_block": BLOCK, "expert_step": 5}
    (checkpoint / "transformer" / "config.json").write_text(json.dumps(named))
    out = tmp_path / "out"
    assert main(["segment", str(image), *CLASSES, "--model", str(checkpoint), "--out", str(out)]) == 0
    record = json.loads((out / "segmentation.json").read_text())
    assert (record["block"], record["step"], record["sigma"]) == (BLOCK, 5, FlowSchedule().sigma_at(5))
    by_hand = s4d.load(checkpoint).segment(image, CLASSES, block=BLOCK, step=5)
    with np.load(out / "scores.npz") as saved:
        np.testing.assert_allclose(saved["scores"], by_hand.scores, rtol=1e-5)


def test_the_record_says_how_the_result_was_made(result, expected, image, sd3_checkpoint):
    record = json.loads((result / "segmentation.json").read_text())
    wanted = {
        "image": str(image),
        "model": str(sd3_checkpoint),
        "block": BLOCK,
        "step": 10,
        "seed": 3,
        "size": [64, 96],
        "resize": "aspect",
        "input_size": [90, 120],
        "dtype": "float32",
        "t5": False,
        "out": str(result),
        "prompts": [" ".join(CLASSES)],
    }
    assert {key: record[key] for key in wanted} == wanted
    assert record["sigma"] == FlowSchedule().sigma_at(10)
    assert {"python", "jax", "flax", "numpy"} <= record["versions"].keys()
    assert all(record["seconds"][stage] > 0 for stage in ("loading", "compiling", "running"))
    assert [entry["name"] for entry in record["classes"]] == CLASSES
    counts = np.bincount(expected.labels.ravel(), minlength=len(CLASSES)) / expected.labels.size
    np.testing.assert_allclose([entry["share"] for entry in record["classes"]], counts)
    ranges = [[score.min(), score.max()] for score in expected.scores]
    np.testing.assert_allclose([entry["score_range"] for entry in record["classes"]], ranges, rtol=1e-5)


def test_there_is_a_picture_of_the_masks_and_one_of_each_class(result):
    assert sorted(path.name for path in (result / "heatmaps").iterdir()) == [
        "00_cat.png",
        "01_dog.png",
        "02_sky.png",
    ]
    for name in ("overlay.png", "heatmaps.png"):
        assert min(Image.open(result / name).size) > 300


def test_areas_are_printed_and_progress_goes_to_stderr_and_only_the_needed_blocks_are_loaded(result, printed, expected):
    rows = [line.rsplit(maxsplit=2) for line in printed["stdout"].splitlines()]
    areas = [f"{100 * np.mean(expected.labels == number):.1f}" for number in range(len(CLASSES))]
    assert [[each.strip() for each in row] for row in rows[1:]] == [
        [name, area, "%"] for name, area in zip(CLASSES, areas, strict=True)
    ]
    for part in ("blocks 0..3 of 0..5, float32", "90 x 120 pixels, seen as 64 x 96", "compiling", "wrote"):
        assert part in printed["stderr"]


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": "absent.png"}, "absent.png: no such file"),
        ({"model": "absent"}, "absent: no such file or directory"),
        ({"block": None}, "does not say which block segments best: name block, 0 to 5"),
        ({"block": "6"}, "block is 6; "),
        ({"step": "29"}, "step is 29"),
        ({"size": "64"}, "--size is '64': expected height x width"),
        ({"size": "64x90"}, "multiples of 16"),
        ({"size": "16x99984"}, "sides must be multiples of 16, up to "),
        ({"seed": "4294967296"}, "seed is 4294967296; expected a whole number, 0 to 4294967295"),
        ({"seed": "-1"}, "seed is -1"),
        ({"classes": ["cat", "cat"]}, "'cat' is repeated"),
        ({"classes": ["cat " * 76]}, "shorten it"),
        ({"tokenizers": "absent"}, "absent has no folder tokenizer"),
    ],
)
def test_bad_input_is_one_message_and_status_1_before_weights_are_read(
    tmp_path, image, sd3_checkpoint, capsys, monkeypatch, changed, message
):
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: pytest.fail("weights were read"))
    options = {"image": str(image), "classes": ["cat"], "model": str(sd3_checkpoint), "block": "1", **changed}
    options["out"] = str(tmp_path / "out")
    named = [f"--{name}={value}" for name, value in options.items() if name not in ("image", "classes") and value]
    assert main(["segment", options["image"], *options["classes"], *named]) == 1
    printed = capsys.readouterr().err
    assert message in printed[printed.index("error: ") :]
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_in_it_is_not_written_to_unasked(tmp_path):
    (tmp_path / "precious.txt").touch()
    with pytest.raises(ValueError, match="is not empty"):
        output_directory(str(tmp_path), "cat.png", overwrite=False)
    with pytest.raises(ValueError, match="is a file"):
        output_directory(str(tmp_path / "precious.txt"), "cat.png", overwrite=True)
    assert output_directory(str(tmp_path), "cat.png", overwrite=True) == tmp_path


@pytest.mark.parametrize("below", ["", "new/deeper"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch, below):
    def refuse(dir):
        assert dir == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(segment, "TemporaryFile", refuse)  # root, who may run the tests, may write anywhere
    with pytest.raises(ValueError, match=rf"--out {tmp_path}.*: cannot write to {tmp_path} \(Permission denied\)"):
        output_directory(str(tmp_path / below), "cat.png", overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Permission denied"):
        output_directory(None, "cat.png", overwrite=False)


def test_a_place_below_a_file_is_refused_and_one_that_can_be_written_left_as_it_was(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"cannot write to {tmp_path / 'file'}"):
        output_directory(str(tmp_path / "file" / "out"), "cat.png", overwrite=False)
    output_directory(str(tmp_path / "out"), "cat.png", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_results_go_by_default_where_no_earlier_ones_are():
    directory = output_directory(None, "some/where/cat.jpeg", overwrite=False)
    assert directory.parent == Path("runs/segment")
    assert directory.name.startswith("cat-")


@pytest.mark.parametrize("text", ["64x96", "64 x 96", "64×96", "64,96"])
def test_sizes_are_height_then_width(text):
    assert parse_size(text) == (64, 96)
    assert parse_size(None) is None


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "out"), 1, "error: [Errno 13] Permission denied: 'out'"),
    ],
)
def test_interruptions_and_refusals_of_the_system_end_without_a_traceback(monkeypatch, capsys, raised, status, message):
    def fail(options):
        raise raised

    monkeypatch.setitem(command_line.COMMANDS, "segment", command_line.COMMANDS["segment"]._replace(run=fail))
    assert main(["segment", "a.png", "cat", "--model", "m"]) == status
    assert capsys.readouterr().err.startswith(message)


def test_a_full_device_is_told_with_what_to_do(monkeypatch, tmp_path, image, sd3_checkpoint, capsys):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(s4d.Pipeline, "segment", fail)
    arguments = ["segment", str(image), "cat", "--model", str(sd3_checkpoint), "--block", "0"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert "error: the device's memory is full: choose a smaller --size" in capsys.readouterr().err
    monkeypatch.setattr(Checkpoint, "load", fail)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert "error: the device's memory is full: give --dtype bfloat16, or use a device" in capsys.readouterr().err


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["segment", "a.png", "cat", "--model", "m", "--blok", "3"])
    assert stopped.value.code == 2
    assert "--blok" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "lacking"),
    [(["segment"], "image, classes, model"), (["convert", "checkpoint"], "source, target")],
)
def test_arguments_that_are_lacking_are_told_by_their_own_names(capsys, arguments, lacking):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert f"arguments are required: {lacking}\n" in capsys.readouterr().err


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_seg4diff_convert_is_python_m_convert(monkeypatch):
    told = []
    monkeypatch.setattr("seg4diff_jax.convert.__main__.main", lambda arguments: told.append(arguments) or 7)
    assert main(["convert", "checkpoint", "a", "b", "--to", "diffusers"]) == 7
    assert told == [["checkpoint", "a", "b", "--to", "diffusers"]]
