"""The table of both ways of asking: our best of each, the paper's in its column, and guessers."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from seg4diff_jax.data.sets import SETS
from seg4diff_jax.evaluation.both_ways import COLUMNS, both_ways
from seg4diff_jax.evaluation.paper_figures import BY_NAMES, FIGURES, IMAGES
from seg4diff_jax.evaluation.report.page import PAGE, write_page
from seg4diff_jax.evaluation.results import tell
from seg4diff_jax.evaluation.rows import Row, best_setting, by_setting
from tests.reference.evaluations import CONFIG, MADE, made_up_benchmark, made_up_evaluation

BENCHMARK = made_up_benchmark(("cat", "sofa", "sky"))
BOTH = ("present", "all")


def made_up(dataset: str = "made-up", **images: object):
    """An evaluation of a whole set, asked both ways, at three blocks and two seeds."""
    own = {"dataset": dataset, "images": IMAGES.get(dataset, 3), "split": "val", **images}
    change = lambda row: replace(row, images=replace(row.images, **own))
    return made_up_evaluation(BENCHMARK, blocks=(3, 6, 9), seeds=(0, 1), prompts=BOTH, change=change)


def of_mean(rows: list[Row]) -> float:
    return float(np.mean([row.metrics.miou for row in rows]))


def test_a_line_has_the_same_setting_asked_both_ways_and_each_ways_best_has_one():
    evaluation = made_up()
    lines = both_ways(evaluation.rows, evaluation.baselines)
    settings = by_setting(evaluation.rows)
    ours = [line for line in lines if not line.guess]
    best = {kind: best_setting([row for row in evaluation.rows if row.prompts == kind]) for kind in BOTH}
    assert [line.title for line in ours] == list(dict.fromkeys(each.title for each in best.values()))
    for line in ours:
        for kind in COLUMNS:
            (same,) = [rows for at, rows in settings.items() if (at.title, at.prompts) == (line.title, kind)]
            assert line.miou[kind] is not None
            assert line.miou[kind][0] == pytest.approx(of_mean(same))
    guessers = [line.title for line in lines if line.guess]
    assert guessers == ["random classes (chance)", "one class everywhere", "positions permuted"]


def test_the_papers_masks_stand_beside_refined_ones_and_refined_ones_beside_no_published_figure():
    evaluation = made_up("voc20")
    better = lambda row: replace(row, refined=True, metrics=replace(row.metrics, miou=100.0), reported=())
    baselines = [*evaluation.baselines, *(replace(row, refined=row.block is not None) for row in evaluation.baselines)]
    rows = [*evaluation.rows, *map(better, evaluation.rows)]
    ours = [line for line in both_ways(rows, baselines) if not line.guess and not line.source]
    first = best_setting([row for row in rows if row.prompts == "present"])
    assert first.refined
    assert [line.title for line in ours[:1]] == [first.title]
    plain = first._replace(refined=False)
    (beside,) = [line for line in ours if line.title == plain.title]
    assert first.title == f"{plain.title}, refined"
    assert beside.miou["present"][0] == pytest.approx(of_mean(by_setting(rows)[plain]))
    assert {row.plain().get("refined") for row in rows} == {None, True}


def test_one_way_of_asking_has_no_table():
    evaluation = made_up()
    present = [row for row in evaluation.rows if row.prompts == "present"]
    assert both_ways(present, evaluation.baselines) == []


@pytest.mark.parametrize("dataset", BY_NAMES)
def test_published_figures_stand_in_the_column_of_what_their_method_is_asked_for(dataset):
    evaluation = made_up(dataset, background=None if SETS[dataset].background is None else "ignored")
    found = {line.title: line.miou for line in both_ways(evaluation.rows, evaluation.baselines) if line.source}
    of_set = [one for one in FIGURES if (one.dataset, one.protocol) == (dataset, "open_vocabulary")]
    asked = {"Seg4Diff": "present", "ProxyCLIP": "all", "CorrCLIP": "all"}
    assert len(of_set) == 9
    assert set(found) == {one.title for one in of_set if one.method in asked}
    for one in of_set:
        if one.method in asked:
            expected = {kind: (one.miou, 0.0) if asked[one.method] == kind else None for kind in BOTH}
            assert found[one.title] == expected


@pytest.mark.parametrize(
    ("dataset", "images"),
    [
        ("voc20", {"images": 100}),
        ("voc20", {"split": "train"}),
        ("voc20", {"list": "some.txt"}),
        ("coco-object", {"background": "scored"}),
        ("voc21", {"background": "scored"}),
        ("coco-171", {}),
    ],
)
def test_other_images_or_a_scored_background_have_no_published_figures(dataset, images):
    evaluation = made_up(dataset, **images)
    assert not any(line.source for line in both_ways(evaluation.rows, evaluation.baselines))


def test_the_page_and_the_terminal_show_both_columns(tmp_path, capsys):
    evaluation = made_up("voc20")
    write_page(tmp_path, evaluation, BENCHMARK, CONFIG, MADE)
    text = " ".join(re.sub(r"<[^>]*>", " ", (tmp_path / PAGE).read_text()).split())
    assert "Classes present, and whole vocabulary mean IoU classes present whole vocabulary" in text
    assert "CorrCLIP, CLIP-H/14 as reported, Table 1 – 91.8" in text
    assert "Seg4Diff, SD3 as reported, Table 1 89.2 –" in text
    assert "it gives the classes present to Seg4Diff and all names to the CLIP methods" in text
    tell(Console(stderr=True), evaluation)
    said = capsys.readouterr().out
    assert re.search(r"CorrCLIP, CLIP-H/14, Table 1 *│ *– │ *91.8", said)
    alone = replace(evaluation, rows=[row for row in evaluation.rows if row.prompts == "present"])
    write_page(tmp_path, alone, BENCHMARK, CONFIG, MADE)
    assert "whole vocabulary" not in (tmp_path / PAGE).read_text()
