"""`seg4diff perturb`: pictures with one block perturbed, their scores, their page, and runs that are interrupted."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.analysis.clip import load_clip
from seg4diff_jax.analysis.dino import load_dino
from seg4diff_jax.analysis.picture_scores import clip_i, clip_t, dino
from seg4diff_jax.command_line import main, perturbation
from tests.reference.inputs import an_image
from tests.reference.scorers import save_scorers

PROMPTS = ["a cat on the grass", "two red buses"]
QUICK = ["--steps", "2", "--size", "32x48", "--batch", "5"]
TWO_SEEDS = ["--seed", "3", "--seeds", "2", "--change", "skip", "--blocks", "0", "4"]
FOLDERS = [
    *("00_a_cat_on_the_grass_seed_3", "00_a_cat_on_the_grass_seed_4"),
    *("01_two_red_buses_seed_3", "01_two_red_buses_seed_4"),
]


class Killed(Exception):
    """Ends a run from within."""


@pytest.fixture(scope="module")
def scorers(tmp_path_factory) -> dict[str, Path]:
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture(scope="module")
def command(tmp_path_factory, sd3_checkpoint, scorers) -> list[str]:
    """All of a command but where its files go."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n\n")
    models = ["--model", str(sd3_checkpoint), "--clip", str(scorers["clip"]), "--dino", str(scorers["vit"])]
    return ["perturb", "--prompts", str(file), *QUICK, *TWO_SEEDS, *models]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command) -> Path:
    """The directory of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    assert main([*command, "--out", str(out)]) == 0
    return out


def files_of(directory: Path) -> dict[str, bytes]:
    """The contents of all files, without the directory's own name."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes().replace(str(directory).encode(), b"OUT") for name, path in found.items()}


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


# ---- what is written ------------------------------------------------------------------------------------------------


def test_each_prompt_and_seed_has_a_folder_with_a_picture_for_each_block(whole):
    pictures = {name for name in files_of(whole) if name.endswith(".png")}
    assert pictures == {f"{folder}/{name}.png" for folder in FOLDERS for name in ("base", "block_00", "block_04")}
    others = {path.name for path in whole.iterdir()} - {*FOLDERS}
    assert others == {"perturbation.html", "perturbation.json", "scores.csv"}


def test_scores_are_those_of_the_written_pictures(whole, scorers):
    with (whole / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {"base": "base", "0": "block_00", "4": "block_04"}
    places = [(prompt, seed) for prompt in PROMPTS for seed in ("3", "4")]
    expected = [(*place, block) for place in places for block in names]
    assert [(row["prompt"], row["seed"], row["block"]) for row in rows] == expected
    made = [pixels(whole / folder / f"{name}.png") for folder in FOLDERS for name in names.values()]
    plain = [pixels(whole / folder / "base.png") for folder in FOLDERS for _ in names]
    clip, vit = load_clip(scorers["clip"]), load_dino(scorers["vit"])
    expected = {
        "CLIP-I": clip_i(clip, made, plain),
        "CLIP-T": clip_t(clip, made, [row["prompt"] for row in rows]),
        "DINO": dino(vit, made, plain),
    }
    for name, scores in expected.items():
        np.testing.assert_allclose([float(row[name]) for row in rows], scores, atol=2e-6)
    assert min(float(row["CLIP-I"]) for row in rows) < 0.999


def test_the_record_has_means_with_standard_errors_and_names_the_models(whole, scorers):
    record = json.loads((whole / "perturbation.json").read_text())
    with (whole / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("CLIP-I", "CLIP-T", "DINO"):
        for found in record["means"]["perturbed"][name]:
            scores = np.array([float(row[name]) for row in rows if row["block"] == str(found["block"])])
            assert found["mean"] == pytest.approx(scores.mean(), abs=2e-6)
            assert found["standard_error"] == pytest.approx(scores.std(ddof=1) / 2, abs=2e-6)
        means = {found["block"]: found["mean"] for found in record["means"]["perturbed"][name]}
        assert record["means"]["lowest"][name] == min(means, key=means.__getitem__)
    plain = np.mean([float(row["CLIP-T"]) for row in rows if row["block"] == "base"])
    assert record["means"]["unperturbed"]["CLIP-T"] == pytest.approx(plain, abs=2e-6)
    assert record["means"]["pictures_per_block"] == 4
    assert record["models"] == {name: str(scorers[which]) for name, which in MODELS.items()}
    assert (record["blocks"], record["change"], record["size"]) == ([0, 4], "skip", [32, 48])


MODELS = {"CLIP-I": "clip", "CLIP-T": "clip", "DINO": "vit"}


def test_the_page_shows_plots_means_and_a_row_of_pictures_for_each_prompt(whole):
    page = (whole / "perturbation.html").read_text()
    assert page.count('class="plot"') == 3
    assert page.count("<img") == len(PROMPTS) * 3, "of the first seed"
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is beside it"
    for text in (
        "2 prompts, 2 seeds, 2 steps, guidance 7.5, 32 x 48 pixels",
        "the block is skipped; all steps",
        *PROMPTS,
    ):
        assert text in page


def test_guided_pictures_are_those_of_generate(sd3, sd3_checkpoint, tmp_path, capsys):
    import seg4diff_jax as s4d

    out = tmp_path / "out"
    options = ["--blocks", "0", "--guide", "30", "--sigma", "60", "--kernel", "151", "--columns", "all"]
    options += ["--at-steps", "2", "--seed", "7", "--pad", "reflect", "--model", str(sd3_checkpoint)]
    assert main(["perturb", "--prompt", PROMPTS[0], *QUICK, *options, "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"no scores: {sd3_checkpoint} has no image_encoder; name a CLIP with --clip" in said
    assert not (out / "scores.csv").exists()
    blur = s4d.Blur(60.0, 151, pad="reflect", text_tokens=(0, None))
    how: dict[str, Any] = {"steps": 2, "size": (32, 48), "guidance": 7.5, "seed": 7}
    away = sd3.generate(PROMPTS[0], perturb=s4d.Perturbation((0,), blur, (2,)), perturbed_guidance=30.0, **how)
    folder = out / "00_a_cat_on_the_grass"
    assert np.abs(pixels(folder / "block_00.png").astype(int) - away).max() <= 1
    assert np.abs(pixels(folder / "base.png").astype(int) - sd3.generate(PROMPTS[0], **how)).max() <= 1
    assert np.abs(pixels(folder / "base.png").astype(int) - away).max() > 2
    page = (out / "perturbation.html").read_text()
    assert "Pictures guided away from one perturbed block" in page
    assert "no scores" in page


def test_the_checkpoints_own_clip_scores_and_the_table_says_so(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--steps", "1", "--guidance", "1", "--size", "16x16", "--blocks", "3", "--model", "miniature"]
    assert main(["perturb", "--prompt", "a star", *options, "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"unperturbed -?[\d.]+ block 3 [\d.]+ -?[\d.]+ the checkpoint's expert", said)
    assert "100 x cosine. CLIP-I and CLIP-T by miniature." in said
    assert "CLIP-I is lowest in pictures of perturbed block 3" in said


# ---- interruptions --------------------------------------------------------------------------------------------------


def interrupt(command: list[str], out: Path, monkeypatch: pytest.MonkeyPatch, when: str, after: int) -> None:
    """Makes a run that ends within the call of a function after so many calls."""
    original, calls = getattr(perturbation, when), []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > after:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(perturbation, when, killed)
        with pytest.raises(Killed):
            main([*command, "--out", str(out)])


@pytest.mark.parametrize(("when", "after"), [("write_picture", 4), ("score_sample", 2)])
def test_a_run_that_is_interrupted_ends_with_the_files_of_one_that_is_not(
    command, whole, tmp_path, monkeypatch, capsys, when, after
):
    out = tmp_path / "out"
    interrupt(command, out, monkeypatch, when, after)
    assert not (out / "perturbation.json").exists()
    there = len(list(out.glob("*/*.png")))
    assert main([*command, "--out", str(out)]) == 1
    assert "holds an interrupted run: give --resume to go on" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert f"going on: {there} of 12 pictures are there" in capsys.readouterr().err
    assert files_of(out) == files_of(whole)


def test_a_run_goes_on_with_the_same_options_only(command, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    interrupt(command, out, monkeypatch, "write_picture", 1)
    assert main([*command, "--guidance", "3", "--out", str(out), "--resume"]) == 1
    assert "is of a run with other options: guidance was 7.5 and is 3.0" in " ".join(capsys.readouterr().err.split())


def test_overwriting_removes_the_former_runs_files_and_no_others(whole, command, sd3_checkpoint, tmp_path):
    out = tmp_path / "out"
    short = ["--steps", "1", "--guidance", "1", "--size", "32x32", "--blocks", "1", "--model", str(sd3_checkpoint)]
    for name in FOLDERS:
        (out / name).mkdir(parents=True)
        (out / name / "block_04.png").write_bytes((whole / name / "block_04.png").read_bytes())
    for name in ("perturbation.json", "scores.csv"):
        (out / name).write_bytes((whole / name).read_bytes())
    Image.fromarray(an_image(8, 8)).save(out / FOLDERS[0] / "mine.png")
    assert main(["perturb", "--prompt", "a", *short, "--out", str(out)]) == 1
    assert main(["perturb", "--prompt", "a", *short, "--out", str(out), "--overwrite"]) == 0
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    new = {"00_a/base.png", "00_a/block_01.png", "perturbation.html", "perturbation.json"}
    assert found == new | {f"{FOLDERS[0]}/mine.png"}


# ---- what is wrong --------------------------------------------------------------------------------------------------

ONE = ["--prompt", "a cat"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to picture: --prompt, or --prompts FILE with a prompt a line: found neither"),
        ([*ONE, "--prompts", "{empty}"], "--prompts FILE with a prompt a line: found both"),
        (["--prompts", "{empty}"], "empty.txt is empty: expected a prompt a line"),
        (["--prompts", "absent.txt"], "absent.txt: no such file; expected a prompt a line"),
        ([*ONE, "--blocks", "6"], "block is 6; "),
        ([*ONE, "--blocks", "-1"], "block is -1; "),
        ([*ONE, "--steps", "4", "--at-steps", "5"], "cannot perturb step 5: this run has steps 4 (the first) to 1"),
        ([*ONE, "--at-steps", "1", "1"], "steps is (1, 1); expected the numbers of one step or more"),
        ([*ONE, "--steps", "0"], "steps is 0"),
        ([*ONE, "--half", "prompt", "--guidance", "1"], "--half is of guidance, and --guidance 1 is none"),
        ([*ONE, "--half", "negative", "--guide", "2"], "--half is of runs that are perturbed themselves"),
        ([*ONE, "--guide", "0"], "--guide is 0: expected a scale above 0"),
        ([*ONE, "--guide", ".inf"], "--guide is inf"),
        ([*ONE, "--change", "skip", "--sigma", "9"], "--sigma is of --change blur: leave it out, or --change skip"),
        ([*ONE, "--change", "skip", "--columns", "all"], "--columns is of --change blur"),
        ([*ONE, "--sigma", "0"], "--sigma 0 is no blur: choose a wider one"),
        ([*ONE, "--kernel", "1"], "--kernel 1 is no blur: choose a wider one"),
        ([*ONE, "--kernel", "4"], "kernel is 4; expected an odd number of taps"),
        ([*ONE, "--sigma", "-1"], "sigma is -1.0; expected a number of tokens, at least 0"),
        ([*ONE, "--seeds", "0"], "--seeds is 0: expected at least 1"),
        ([*ONE, "--batch", "0"], "--batch is 0: expected at least 1"),
        ([*ONE, "--seed", "-1"], "seed is -1"),
        ([*ONE, "--size", "30x30"], "30"),
        ([*ONE, "--clip", "{empty}/nothing"], "nothing: no such directory, and not a Hub id"),
        ([*ONE, "--dino", "{empty}"], "--dino scores beside a CLIP"),
        ([*ONE, "--resume"], "--resume goes on with the run in --out: name its directory"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_before_the_model_is_loaded(
    sd3_checkpoint, tmp_path, monkeypatch, capsys, options, message
):
    (tmp_path / "empty.txt").write_text("\n \n")
    monkeypatch.chdir(tmp_path)
    given = [option.format(empty=tmp_path / "empty.txt") for option in options]
    assert main(["perturb", *given, "--model", str(sd3_checkpoint)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: ")
    assert message in said
    assert "loaded" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"empty.txt"}
