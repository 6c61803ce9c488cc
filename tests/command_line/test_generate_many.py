"""`seg4diff generate` over many prompts: by file, interrupted and resumed, and named for T2I-CompBench++'s scorers."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.command_line import generate, main
from seg4diff_jax.command_line.generate import write_pictures
from seg4diff_jax.command_line.picture_directory import GRID, RECORD, remove_former, sample_names
from seg4diff_jax.interrupted_runs import DIRECTORY, begin
from seg4diff_jax.terminal import stderr_console
from tests.reference.inputs import VARIED, an_image

PROMPTS = ["a cat on the grass", "the grass. a cat", "a cat by the grass"]
QUICK = ["--steps", "1", "--guidance", "1", "--size", "32x32", "--seed", "3"]
MASKED = ["--segment", "cat", "the grass", "--block", str(VARIED)]
SEVERAL = ["--count", "2", "--batch", "4"]


class Killed(Exception):
    """Ends a run from within."""


def in_file(directory: Path, prompts: list[str]) -> list[str]:
    """A file with the line ends of Windows, which those of T2I-CompBench++ have."""
    file = directory / "prompts.txt"
    file.write_bytes("\r\n".join(prompts).encode())
    return ["--prompts", str(file)]


def files_of(directory: Path) -> dict[str, bytes]:
    """The contents of all files. Of the record only what does not say how long it took, and where it lies."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    record = json.loads(found.pop(RECORD).read_text()) if RECORD in found else {}
    contents = {name: path.read_bytes().replace(str(directory).encode(), b"OUT") for name, path in found.items()}
    plain = {name: value for name, value in record.items() if name not in ("seconds", "out")}
    return contents | {RECORD: json.dumps(plain).encode()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sd3_checkpoint) -> dict[str, bytes]:
    """The files of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    arguments = ["generate", *PROMPTS, *QUICK, *SEVERAL, *MASKED, "--model", str(sd3_checkpoint)]
    assert main([*arguments, "--out", str(out)]) == 0
    return files_of(out)


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_in_a_file_make_the_pictures_of_prompts_that_are_named(whole, tmp_path, sd3_checkpoint):
    arguments = in_file(tmp_path, ["﻿" + PROMPTS[0], "", f" {PROMPTS[1]} ", *PROMPTS[2:], "", ""])
    out = tmp_path / "out"
    options = [*QUICK, *SEVERAL, *MASKED, "--model", str(sd3_checkpoint)]
    assert main(["generate", *arguments, *options, "--out", str(out)]) == 0
    assert files_of(out) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a cat", "--prompts", "absent.txt"], "PROMPT, or --prompts FILE with a prompt a line: found both"),
        ([], "PROMPT, or --prompts FILE with a prompt a line: found neither"),
        (["--prompts", "absent.txt"], "absent.txt: no such file; expected a prompt a line"),
        (["--prompts", "empty.txt"], "empty.txt is empty: expected a prompt a line"),
        (["a cat", "--resume"], "--resume goes on with the run in --out: name its directory"),
    ],
)
def test_prompts_that_are_not_there_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    assert main(["generate", *arguments, "--model", "miniature"]) == 1
    assert f"error: {message}" in capsys.readouterr().err.replace("say what to picture: ", "")


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_no_picture_is_kept_once_it_is_written(tmp_path):
    seen: list[weakref.ref] = []

    def made() -> Iterator[Any]:
        for place in range(5):
            gc.collect()
            assert sum(each() is not None for each in seen) <= 1
            picture = an_image(16, 16, place)
            seen.append(weakref.ref(picture))
            yield place, picture, None
            del picture

    pictures = [{"file": f"{number}.png", "prompt": ""} for number in range(5)]
    begin(tmp_path / DIRECTORY, {})
    write_pictures(stderr_console(), tmp_path, made(), pictures, {}, done=0)
    assert all(np.array_equal(Image.open(tmp_path / f"{number}.png"), an_image(16, 16, number)) for number in range(5))


def test_the_grid_shows_no_more_than_the_first(tmp_path, sd3_checkpoint, monkeypatch):
    arguments = ["generate", "a", "b", "c", *QUICK, "--model", str(sd3_checkpoint)]
    assert main([*arguments, "--out", str(tmp_path / "all")]) == 0
    monkeypatch.setattr(generate, "MOST_IN_GRID", 2)
    assert main([*arguments, "--out", str(tmp_path / "first")]) == 0
    sizes = [Image.open(tmp_path / name / GRID).size for name in ("all", "first")]
    assert np.prod(sizes[1]) < np.prod(sizes[0])


# ---- interruptions --------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path, sd3_checkpoint, monkeypatch) -> Any:
    """Makes a run that ends within a picture, after a number of them, and gives its directory and its arguments."""

    def interrupt(after: int) -> tuple[Path, list[str]]:
        out, done = tmp_path / "out", []
        arguments = ["generate", *PROMPTS, *QUICK, *SEVERAL, *MASKED, "--model", str(sd3_checkpoint), "--out", str(out)]
        with monkeypatch.context() as patch:
            write = generate.write_picture

            def killed(out: Path, file: str, picture: np.ndarray) -> None:
                if len(done) == after:
                    patch.setattr("seg4diff_jax.interrupted_runs.os.replace", fail)
                done.append(file)
                write(out, file, picture)

            patch.setattr(generate, "write_picture", killed)
            with pytest.raises(Killed):
                main(arguments)
        return out, arguments

    def fail(*_: Any) -> None:
        raise Killed

    return interrupt


@pytest.mark.parametrize("after", [3, 5])
def test_a_run_that_is_interrupted_ends_with_the_files_of_one_that_is_not(whole, interrupted, capsys, after):
    out, arguments = interrupted(after)
    assert len(list(out.glob("*.png"))) == after
    assert not (out / RECORD).exists()
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 0
    assert f"going on: {after} of 6 pictures are there" in capsys.readouterr().err
    assert files_of(out) == whole
    assert main([*arguments, "--resume"]) == 1
    assert "is complete: there is nothing to --resume" in capsys.readouterr().err


def test_pictures_that_are_there_are_not_made_again(interrupted, monkeypatch):
    _, arguments = interrupted(4)
    batches, run = [], s4d.Pipeline.generate
    monkeypatch.setattr(s4d.Pipeline, "generate", lambda *a, **k: batches.append(a[1]) or run(*a, **k))
    assert main([*arguments, "--resume"]) == 0
    assert batches == [[PROMPTS[2]] * 4]


def test_a_run_goes_on_with_its_own_options_only(interrupted, monkeypatch, capsys):
    out, arguments = interrupted(1)
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: pytest.fail("weights were read"))
    other = [*arguments[:1], "the grass, a cat", *arguments[1:]]
    for changed, message in (
        ([*arguments, "--seed", "4"], "seed was 3 and is 4"),
        ([*arguments, "--batch", "2"], "batch was 4 and is 2"),
        ([*arguments, "--count", "3"], "count was 2 and is 3. Give"),
        (other, "prompt 1 was 'a cat on the grass' and is 'the grass, a cat'; prompt 2 was"),
    ):
        assert main([*changed, "--resume"]) == 1
        said = capsys.readouterr().err
        assert f"{DIRECTORY} is of a run with other options: " in said
        assert message in said
    assert len(list(out.glob("*.png"))) == 1


def test_an_interrupted_run_is_replaced_only_when_told(interrupted, capsys, sd3_checkpoint):
    out, arguments = interrupted(4)
    (out / "mine.png").touch()
    assert main(arguments) == 1
    assert "holds an interrupted run: give --resume to go on, or --overwrite to begin anew" in capsys.readouterr().err
    model = ["--model", str(sd3_checkpoint), "--out", str(out)]
    assert main(["generate", "sofa", *QUICK, *model, "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["00_sofa.png", RECORD, "mine.png"]


@pytest.mark.parametrize("damage", ["", "{", '{"prompts": 3}', "[]"])
def test_a_damaged_note_of_a_run_is_one_sentence(tmp_path, capsys, sd3_checkpoint, damage):
    (tmp_path / DIRECTORY).mkdir()
    (tmp_path / DIRECTORY / "run.json").write_text(damage)
    arguments = ["generate", "sofa", *QUICK, "--model", str(sd3_checkpoint), "--out", str(tmp_path)]
    assert main([*arguments, "--resume"]) == 1
    said = capsys.readouterr().err
    assert "run.json" in said
    assert "give --overwrite to begin anew" in said
    assert main([*arguments, "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00_sofa.png", RECORD]


# ---- T2I-CompBench++ ------------------------------------------------------------------------------------------------


def scored(directory: Path) -> list[tuple[int, str]]:
    """Number and prompt of each file, as the scorers take them from the names."""
    names = [path.name for path in (directory / "samples").iterdir()]
    assert all(name.count("_") == 1 for name in names)
    return sorted((int(name.split("_")[-1].split(".")[0]), name.split("_")[0]) for name in names)


def test_the_scorers_read_ten_pictures_of_each_prompt_in_their_order(tmp_path, sd3_checkpoint):
    prompts = ["the fluffy cat. it sat on a rug.", "A green bench & a blue bowl", "a dog's ball, a 1.5 l jug"]
    out = tmp_path / "color"
    options = [*QUICK, "--batch", "8", "--layout", "compbench", "--model", str(sd3_checkpoint), "--out", str(out)]
    assert main(["generate", *in_file(tmp_path, prompts), *options]) == 0
    assert scored(out) == [(number, prompts[number // 10]) for number in range(30)]
    assert sorted(path.name for path in out.iterdir()) == [RECORD, GRID, "samples"]
    made = json.loads((out / RECORD).read_text())["pictures"]
    assert made[10] == {"file": f"samples/{prompts[1]}_000010.png", "prompt": prompts[1]}
    assert main(["generate", "sofa", *QUICK, "--model", str(sd3_checkpoint), "--out", str(out), "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["00_sofa.png", RECORD]


def test_the_same_pictures_have_other_names(tmp_path, sd3_checkpoint):
    arguments = ["generate", "a cat", *QUICK, "--count", "2", "--model", str(sd3_checkpoint)]
    assert main([*arguments, "--out", str(tmp_path / "numbered")]) == 0
    assert main([*arguments, "--layout", "compbench", "--out", str(tmp_path / "named")]) == 0
    one, other = (tmp_path / "numbered" / "00_a_cat_2.png", tmp_path / "named" / "samples" / "a cat_000001.png")
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat and/or a dog", "it has '/', and a name holds no slash; leave it out"),
        ("a_cat", "it has '_', and an underscore begins the picture's number; leave it out"),
        ("a sign that says cat.png", "it has '.png', and that ends the name; leave it out"),
        ("a cat\ta dog", r"it has '\t', and a name should hold no control character; leave it out"),
        ("ä" * 123, "the name would have 257 bytes, of at most 255; shorten it"),
    ],
)
def test_a_prompt_that_the_scorers_would_misread_is_refused(prompt, message):
    with pytest.raises(ValueError, match=r"^prompt 2, '.*, cannot be read from a file's name") as caught:
        sample_names(["a dog.", prompt], 10)
    assert str(caught.value).endswith(message)
    assert "\n" not in str(caught.value)


def test_masks_have_no_place_among_samples(sd3_checkpoint, tmp_path, capsys):
    arguments = ["generate", "a cat", "--segment", "cat", "--block", "0", "--layout", "compbench"]
    assert main([*arguments, "--model", str(sd3_checkpoint), "--out", str(tmp_path / "out")]) == 1
    assert "error: --layout compbench is for scorers that know no masks" in capsys.readouterr().err


def test_a_folder_of_samples_that_leads_elsewhere_is_left_alone(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a_000000.png").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples").symlink_to(tmp_path / "elsewhere")
    record = {"pictures": [{"file": "samples/a_000000.png"}, {"file": "../elsewhere/a_000000.png"}]}
    (tmp_path / "out" / RECORD).write_text(json.dumps(record))
    remove_former(tmp_path / "out")
    assert (tmp_path / "elsewhere" / "a_000000.png").exists()
