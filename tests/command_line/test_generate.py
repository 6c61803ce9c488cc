"""`seg4diff generate` at the terminal: the pictures it writes, what it prints, and how it says what is wrong."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.command_line import main
from seg4diff_jax.command_line.picture_directory import RECORD, file_names, grid, remove_former
from seg4diff_jax.reporting.segmentation_files import FILES as FILES_OF_MASKS
from tests.reference.inputs import VARIED, an_image
from tests.reference.ties import assert_same_labels

PROMPTS = ["a cat on the grass", "two red buses, at night"]
FILES = [
    "00_a_cat_on_the_grass_1.png",
    "00_a_cat_on_the_grass_2.png",
    "01_two_red_buses_at_night_1.png",
    "01_two_red_buses_at_night_2.png",
]
PNG = str(Path(__file__).parents[2] / "docs" / "pictures" / "samples.png")
OPTIONS = ["--negative", "sky", "--steps", "3", "--guidance", "5", "--seed", "3", "--size", "64x96"]


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What the run of `result` wrote to the terminal."""
    return {}


@pytest.fixture(scope="module")
def result(tmp_path_factory, sd3_checkpoint, printed) -> Path:
    out = tmp_path_factory.mktemp("out") / "new" / "result"
    model = ["--model", str(sd3_checkpoint), "--out", str(out)]
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        assert main(["generate", *PROMPTS, *OPTIONS, "--count", "2", "--batch", "3", *model]) == 0
    printed |= {"stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
    return out


# ---- results --------------------------------------------------------------------------------------------------------


def test_the_pictures_are_the_pipelines_whatever_the_batch(result, sd3):
    expected = sd3.generate(
        PROMPTS, images_per_prompt=2, negative_prompt="sky", steps=3, guidance=5.0, seed=3, size=(64, 96)
    )
    for name, picture in zip(FILES, expected, strict=True):
        found = np.asarray(Image.open(result / name))
        assert found.shape == (64, 96, 3)
        assert np.abs(found.astype(int) - picture).max() <= 1


def test_there_is_nothing_but_the_pictures_a_grid_of_them_and_the_record(result):
    assert sorted(path.name for path in result.iterdir()) == sorted([*FILES, "grid.png", "generation.json"])
    assert min(Image.open(result / "grid.png").size) > 500


def test_the_record_says_how_the_pictures_were_made(result, sd3_checkpoint):
    record = json.loads((result / "generation.json").read_text())
    wanted = {
        "prompts": PROMPTS,
        "negative": "sky",
        "model": str(sd3_checkpoint),
        "steps": 3,
        "guidance": 5.0,
        "seed": 3,
        "count": 2,
        "size": [64, 96],
        "dtype": "float32",
        "t5": False,
        "out": str(result),
        "pictures": [{"file": name, "prompt": PROMPTS[index // 2]} for index, name in enumerate(FILES)],
    }
    assert {key: record[key] for key in wanted} == wanted
    assert {"python", "jax", "flax", "numpy"} <= record["versions"].keys()
    assert all(record["seconds"][stage] > 0 for stage in ("loading", "compiling", "running"))


def test_progress_goes_to_stderr(result, printed):
    assert printed["stdout"] == ""
    for part in ("blocks 0..5 of 0..5, float32", "generated 4 of 64 x 96 pixels in", "compiling", "wrote", FILES[0]):
        assert part in printed["stderr"]


def test_only_files_that_a_record_names_go_whatever_names_it_has(tmp_path):
    (tmp_path / "kept").mkdir()
    for name in ("00_a.png", "mine.png"):
        (tmp_path / name).touch()
    names = ["x" * 10**6, "a\0b", "", "..", "kept", "00_a.png"]
    (tmp_path / RECORD).write_text(json.dumps({"pictures": [{"file": name} for name in names]}))
    remove_former(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "mine.png"]


def test_one_picture_has_the_trained_size_and_no_grid_and_replaces_an_earlier_run_when_told(
    tmp_path, sd3_checkpoint, capsys
):
    record = {"pictures": [{"file": "00_former_1.png"}, {"file": "00_former_2.png"}]}
    (tmp_path / "generation.json").write_text(json.dumps(record))
    for name in ("00_former_1.png", "00_former_2.png", "grid.png", "2024_mine.png"):
        (tmp_path / name).touch()
    arguments = ["generate", "sofa", "--steps", "1", "--guidance", "1", "--model", str(sd3_checkpoint)]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path), "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00_sofa.png", "2024_mine.png", "generation.json"]
    assert Image.open(tmp_path / "00_sofa.png").size == (128, 128)


def test_files_are_named_by_prompt_and_number():
    assert file_names(["a cat", ""], 1) == ["00_a_cat.png", "01_picture.png"]
    assert file_names(["a/b: c?"], 2) == ["00_a_b_c_1.png", "00_a_b_c_2.png"]
    assert len(set(file_names(["same", "same"] * 60, 11))) == 1320
    assert all(len(name) < 80 for name in file_names(["long words " * 100], 2))


@pytest.mark.parametrize("size", [(32, 48), (1024, 512)])
def test_the_grid_shows_small_pictures_enlarged_and_large_ones_reduced(size):
    sheet = grid(["a cat"] * 2, 2, [an_image(*size)] * 2)
    assert 256 < min(sheet.size) <= max(sheet.size) < 1200


def test_pictures_that_start_from_an_image_keep_its_aspect(tmp_path, sd3_checkpoint, sd3):
    image, out = tmp_path / "image.png", tmp_path / "out"
    Image.fromarray(an_image(96, 160)).save(image)
    start = ["--image", str(image), "--strength", "0.5", "--model", str(sd3_checkpoint), "--out", str(out)]
    assert main(["generate", "a cat", "--steps", "4", "--count", "2", *start]) == 0
    expected = sd3.generate(["a cat"] * 2, steps=4, image=image, strength=0.5)
    for number, picture in enumerate(expected, 1):
        found = np.asarray(Image.open(out / f"00_a_cat_{number}.png"))
        assert np.abs(found.astype(int) - picture).max() <= 1
    record = json.loads((out / RECORD).read_text())
    assert (record["image"], record["strength"]) == (str(image), 0.5)
    assert record["size"] == list(expected[0].shape[:2])


# ---- masks ----------------------------------------------------------------------------------------------------------

LOOKING = ["--segment", "cat", "the grass", "--block", str(VARIED), "--at-step", "2"]
MASKED = ["a cat on the grass", "the grass, a cat"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory, sd3_checkpoint) -> Path:
    out = tmp_path_factory.mktemp("masked")
    model = ["--model", str(sd3_checkpoint), "--out", str(out)]
    assert main(["generate", *MASKED, *OPTIONS, "--batch", "3", *LOOKING, *model]) == 0
    return out


def test_beside_each_picture_lie_its_masks_as_segment_writes_them(masked, sd3):
    expected = sd3.generate(
        MASKED,
        segment=["cat", "the grass"],
        block=VARIED,
        at_step=2,
        negative_prompt="sky",
        steps=3,
        guidance=5.0,
        seed=3,
        size=(64, 96),
    )
    for name, (picture, masks) in zip(["00_a_cat_on_the_grass", "01_the_grass_a_cat"], expected, strict=True):
        folder = masked / f"{name}_masks"
        assert np.abs(np.asarray(Image.open(masked / f"{name}.png")).astype(int) - picture).max() <= 1
        assert {path.name for path in folder.iterdir()} == {*(file.rstrip("/") for file in FILES_OF_MASKS), "binary"}
        labels = np.asarray(Image.open(folder / "labels.png"))
        assert_same_labels(labels.astype(np.int32), masks.labels, masks.scores)
        for index, file in enumerate(["00_cat.png", "01_the_grass.png"]):
            mask = Image.open(folder / "binary" / file)
            assert mask.mode == "L"
            np.testing.assert_array_equal(np.asarray(mask), np.where(labels == index, 255, 0))
        record = json.loads((folder / "segmentation.json").read_text())
        assert [each["name"] for each in record["classes"]] == ["cat", "the grass"]
        assert (record["file"], record["at_step"]) == (f"{name}.png", 2)


def test_the_record_names_the_masks_and_where_they_were_read(masked):
    record = json.loads((masked / RECORD).read_text())
    assert (record["segment"], record["block"], record["at_step"]) == (["cat", "the grass"], VARIED, 2)
    assert [made["masks"] for made in record["pictures"]] == [
        "00_a_cat_on_the_grass_masks",
        "01_the_grass_a_cat_masks",
    ]


def test_masks_of_an_earlier_run_are_replaced_and_other_files_stay(masked, tmp_path, sd3_checkpoint):
    out = tmp_path / "out"
    shutil.copytree(masked, out)
    (out / "00_a_cat_on_the_grass_masks" / "mine.txt").touch()
    arguments = ["generate", "sofa", "--steps", "1", "--guidance", "1", "--size", "32x32", "--out", str(out)]
    assert main([*arguments, "--model", str(sd3_checkpoint), "--overwrite"]) == 0
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert found == ["00_a_cat_on_the_grass_masks/mine.txt", "00_sofa.png", RECORD]
    assert not (out / "01_the_grass_a_cat_masks").exists()


def test_a_folder_that_a_record_names_keeps_what_is_not_of_masks(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "00_mine.png").touch()
    (tmp_path / "kept" / "binary").mkdir(parents=True)
    (tmp_path / "kept" / "heatmaps").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "kept" / "photo.png").touch()
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    masks = ["kept", "linked", "..", ".", "absent"]
    (tmp_path / RECORD).write_text(json.dumps({"pictures": [{"file": "a.png", "masks": name} for name in masks]}))
    remove_former(tmp_path)
    assert (tmp_path / "kept" / "photo.png").exists()
    assert (tmp_path / "elsewhere" / "00_mine.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "kept", "linked"]


def test_a_single_word_is_warned_of_once(tmp_path, sd3_checkpoint, capsys):
    arguments = ["generate", "a cat", "--steps", "1", "--size", "32x32", "--segment", "cat", "--block", "0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", s4d.OneClassWarning)
        assert main([*arguments, "--model", str(sd3_checkpoint), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.replace("\n", " ").count("is the only word") == 1


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "absent"}, "absent: no such file or directory"),
        ({"steps": "0"}, "steps is 0; expected a whole number, 1 to 1000"),
        ({"count": "0"}, "--count is 0: expected at least 1"),
        ({"batch": "-1"}, "--batch is -1: expected at least 1"),
        ({"size": "64"}, "--size is '64': expected height x width"),
        ({"size": "64x90"}, "multiples of 16"),
        ({"seed": "-1"}, "seed is -1"),
        ({"t5": "true", "tokenizers": "absent"}, "absent has no folder tokenizer"),
        ({"at-step": "2"}, "--block and --at-step say where masks are read: name words of the prompt with --segment"),
        ({"block": "2"}, "--block and --at-step say where masks are read: name words of the prompt with --segment"),
        ({"strength": "0.5"}, "--strength says how far to go from an image: name one with --image"),
        ({"image": __file__, "strength": "0.5"}, "test_generate.py"),
        ({"image": "absent.png"}, "absent.png"),
        ({"image": PNG, "strength": "0"}, "strength is 0.0; expected a number above 0 and at most 1"),
        ({"segment": "dog"}, "the prompt 'a cat' has no 'dog': its words are a, cat"),
        ({"segment": "cat"}, "does not say which block segments best"),
        ({"segment": "cat", "block": "6"}, "block is 6"),
        (
            {"segment": "cat", "block": "1", "at-step": "29"},
            "at_step is 29; expected a whole number, 1 (the last step)",
        ),
        (
            {"image": PNG, "segment": "cat", "block": "1", "at-step": "20"},
            "at_step is 20; expected a whole number, 1 (the last step) to 17 (the first)",
        ),
    ],
)
def test_bad_input_is_one_message_and_status_1_before_weights_are_read(
    tmp_path, sd3_checkpoint, capsys, monkeypatch, changed, message
):
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: pytest.fail("weights were read"))
    options = {"model": str(sd3_checkpoint), "out": str(tmp_path / "out"), **changed}
    flags = ["--t5"] if options.pop("t5", None) else []
    assert main(["generate", "a cat", *flags, *(f"--{name}={value}" for name, value in options.items())]) == 1
    printed = capsys.readouterr().err
    assert message in printed[printed.index("error: ") :]
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_a_full_device_is_told_with_what_to_do(monkeypatch, tmp_path, sd3_checkpoint, capsys):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(s4d.Pipeline, "generate", fail)
    assert main(["generate", "a cat", "--model", str(sd3_checkpoint), "--out", str(tmp_path / "out")]) == 1
    assert "error: the device's memory is full: choose a smaller --size" in capsys.readouterr().err
