"""`seg4diff compare RUN RUN`, held against numpy on the written files; and confusion.csv, which is one of them."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seg4diff_jax.command_line import compare, main
from seg4diff_jax.evaluation.results import write
from tests.reference.evaluations import CONFIG, MADE, made_up_benchmark, made_up_evaluation

NAMES = ["cat", "a dog, sitting", "sky", "wall"]


def written(directory: Path, **changes) -> Path:
    benchmark = made_up_benchmark(NAMES)
    given = {"images": 3, "pixels": 1000, **changes.pop("images", {})}
    change = lambda row: replace(row, images=replace(row.images, **given))
    evaluation = made_up_evaluation(benchmark, change=change, **changes)
    write(directory, evaluation, benchmark, CONFIG, MADE["seconds"])
    return directory


def altered(directory: Path, seed: int, *, missing: str | None = None) -> None:
    """Every score of a run changed at random; one class gone from every row."""
    draw = np.random.default_rng(seed)
    path = directory / "results.json"
    contents = json.loads(path.read_text())
    for row in contents["rows"]:
        for scores in (row, row["iou"]):
            for name in ("miou", "pixel_accuracy", *NAMES):
                if name in scores:
                    scores[name] = None if name == missing else round(float(draw.uniform(20, 80)), 4)
    path.write_text(json.dumps(contents))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    first = written(root / "first", blocks=(3, 9), steps=(8,), seeds=(0, 1, 2), prompts=("present",))
    second = written(root / "second", blocks=(9, 12), steps=(8,), seeds=(5, 6), prompts=("present",))
    altered(first, 1)
    altered(second, 2, missing="wall")
    return first, second


def values(run: Path, block: int, *names: str) -> list[float | None]:
    """A figure of each seed, read off the file."""
    found = []
    for row in json.loads((run / "results.json").read_text())["rows"]:
        if row["block"] == block:
            for name in names:
                row = row[name]
            found.append(row)
    return found


def printed(capsys, *arguments: str) -> tuple[dict[str, list[str]], str, str]:
    """Cells of the tables by a line's first, standard output and standard error."""
    assert main(["compare", *arguments]) == 0
    output, errors = capsys.readouterr()
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in output.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if cells}, output, errors


@pytest.mark.parametrize(
    ("line", "names"),
    [("mIoU", ("miou",)), ("pixel accuracy", ("pixel_accuracy",)), *((name, ("iou", name)) for name in NAMES[:3])],
)
def test_figures_are_numpys_of_the_written_files(line, names, runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    first, second = (np.array(values(run, 9, *names)) for run in runs)
    cells, _, _ = printed(capsys, *map(str, runs))
    spread = np.sqrt(first.var(ddof=1) + second.var(ddof=1))
    expected = first.mean(), second.mean(), second.mean() - first.mean(), spread
    np.testing.assert_allclose([float(cell) for cell in cells[line]], expected, atol=0.00501)


def test_rows_are_matched_and_what_one_run_alone_has_is_named(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    cells, output, errors = printed(capsys, *map(str, runs))
    assert output.count("noise level 8") == 1
    assert "present classes, block 9, noise level 8" in output
    assert f"only {runs[0]} has: present classes, block 3, noise level 8" in errors
    assert f"only {runs[1]} has: present classes, block 12, noise level 8" in errors
    mean = np.mean([float(each or 0) for each in values(runs[0], 9, "iou", "wall")])
    assert cells["wall"] == [f"{mean:.2f}", "–", "–", "–"], "the second run has no such pixels"


def test_classes_that_differ_most_come_first_and_the_rest_is_counted(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    cells, output, _ = printed(capsys, *map(str, runs), "--classes=1")
    differences = {
        name: abs(np.mean(values(runs[1], 9, "iou", name)) - np.mean(values(runs[0], 9, "iou", name)))
        for name in NAMES[:3]
    }
    assert [name for name in NAMES if name in cells] == [max(differences, key=lambda name: differences[name])]
    assert "and 3 classes that differ less: --classes=4 shows all" in output


def test_differences_beyond_the_seeds_spread_are_told_from_others():
    rows = lambda *scores: [{"miou": score} for score in scores]
    far = compare.compared(rows(10.0, 12.0), rows(30.0, 32.0), "miou", "mIoU")
    near = compare.compared(rows(10.0, 12.0), rows(11.0, 13.0), "miou", "mIoU")
    assert (far.difference, near.difference) == (20.0, 1.0)
    assert far.spread == near.spread == pytest.approx(2.0)
    cells = list(compare.table("", "", [far, near]).columns[3].cells)
    assert [(cell.plain, cell.style) for cell in cells] == [("+20.00 *", "bold"), ("+1.00  ", "")]


def test_with_one_seed_a_difference_cannot_be_judged(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    alone = written(tmp_path / "alone", blocks=(9,), seeds=(0,))
    cells, _, errors = printed(capsys, str(runs[0]), str(alone))
    assert cells["mIoU"][3] == "–"
    assert "B has one seed only: what seeds alone change is not known, so a difference cannot be judged" in errors
    _, _, errors = printed(capsys, str(alone), str(alone))
    assert "A and B have one seed only" in errors
    assert "cannot be judged" not in printed(capsys, *map(str, runs))[2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": {"dataset": "voc20"}}, "did not score the same images, so they cannot be compared: dataset"),
        ({"images": {"images": 4, "pixels": 1001}}, "images 3 and 4; pixels 1000 and 1001"),
        ({"images": {"split": "train"}}, "split "),
        ({"blocks": (1,)}, "have no row in common: the first has present classes, block 3, noise level 8, the second"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_in_a_sentence(changes, said, runs, tmp_path, capsys):
    other = written(tmp_path / "other", **changes)
    assert main(["compare", str(runs[0]), str(other)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {runs[0]} and {other} ")
    assert said in line


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (None, "no such file; expected the directory of a finished run of evaluate.py"),
        ("{", "results.json"),
        ("{}", "rows is None; expected a list of scores"),
        ('{"rows": [1]}', "row 0 has no scores"),
        ('{"rows": [{"protocol": 3}]}', "row 0 has no usable protocol"),
    ],
)
def test_what_is_no_result_is_refused_by_file(contents, said, runs, tmp_path, capsys):
    if contents is not None:
        (tmp_path / "results.json").write_text(contents)
    assert main(["compare", str(runs[0]), str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'results.json'}")
    assert said in error


@pytest.mark.parametrize(("name", "wrong"), [("miou", "1"), ("block", None), ("iou", {"cat": "much"}), ("seed", True)])
def test_a_damaged_row_is_refused_by_its_figure(name, wrong, tmp_path):
    run = written(tmp_path / "run")
    contents = json.loads((run / "results.json").read_text())
    contents["rows"][0][name] = wrong
    (run / "results.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=rf"results\.json: row 0 has no usable {name}.*damaged"):
        compare.read_rows(run)


# ---- confusion.csv --------------------------------------------------------------------------------------------------


def test_the_confusion_matrix_is_written_with_its_classes_in_whole_pixels(tmp_path):
    benchmark = made_up_benchmark(NAMES)
    evaluation = made_up_evaluation(benchmark)
    write(tmp_path, evaluation, benchmark, CONFIG, MADE["seconds"])
    with (tmp_path / "confusion.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["", *NAMES]
    assert [name for name, *_ in lines] == NAMES
    assert evaluation.confusion is not None
    np.testing.assert_array_equal([[int(pixels) for pixels in cells] for _, *cells in lines], evaluation.confusion)


def test_a_run_without_names_leaves_no_confusion_matrix_of_an_earlier_one(tmp_path):
    (tmp_path / "confusion.csv").write_text("of before")
    written(tmp_path, prompts=(None,))
    assert not (tmp_path / "confusion.csv").exists()


def test_rows_that_were_asked_for_other_decoys_are_other_rows(tmp_path, capsys):
    runs = []
    for count in (2, 4):
        directory = written(tmp_path / str(count), prompts=("decoys",))
        path = directory / "results.json"
        contents = json.loads(path.read_text())
        for row in contents["rows"]:
            row |= {"decoys": count, "decoys_seed": 0}
        path.write_text(json.dumps(contents))
        runs.append(str(directory))
    assert main(["compare", *runs]) == 1
    said = capsys.readouterr().err
    assert "the first has present classes and decoys (2, seed 0), block 9, noise level 8" in said
    assert "the second present classes and decoys (4, seed 0)" in said
    assert main(["compare", runs[0], runs[0]]) == 0
