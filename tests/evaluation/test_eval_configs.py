"""configs/eval: the rows of the paper's tables, as options that evaluate.py takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.better_masks import CHOSEN
from benchmarks.convert_checkpoint import CONFIGS
from benchmarks.real_shapes.flops import stages
from seg4diff_jax.command_line.evaluate import unasked
from seg4diff_jax.data.sets import SETS
from seg4diff_jax.evaluation.benchmarks import misfits
from seg4diff_jax.evaluation.options import (
    STEPS,
    kinds_of_prompts,
    listed_words,
    metrics,
    numbers,
    parse,
    protocols,
    thresholds,
)
from seg4diff_jax.evaluation.paper_figures import BY_NAMES, FIGURES, METHOD, RESIZES, THRESHOLDS, WITHOUT_NAMES

ROOT = Path(__file__).parents[2]
OTHER_MEASURES = ("coco_object_background", "unsupervised_stuff27_listed", "vocabulary_object")
"""Configurations of sets of which the paper's figures are measured in another way."""
WHOLE = "vocabulary_"
"""What the names of configurations begin with that ask for the whole vocabulary."""
EIGHT = ("voc21", "context60", "coco-object", "voc20", "context59", "coco-171", "cityscapes19", "ade20k150")
"""The sets by which methods that are not trained are compared, all names given."""
PROMPTS = {"coco-object": 2, "ade20k150": 3, "coco-171": 4}
"""Into how many prompts all names of a set go, where one is too short: 98, 184 and 251 of CLIP's tokens."""
MINIATURE = ROOT / "configs" / "eval" / "miniature_best.yaml"
FILES = sorted({*(ROOT / "configs" / "eval").glob("*.yaml")} - {MINIATURE})


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request) -> Path:
    return request.param


def header(file: Path) -> str:
    lines = file.read_text("utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def test_a_configuration_is_understood_and_names_a_set_that_exists(file):
    options = parse(["--config", str(file)])
    published = SETS[options.data.name or ""]
    assert options.data.background is None or published.background is not None
    assert (options.blocks, options.steps, numbers(options.seeds, "", range(10))) == (9, 8, (0, 1, 2))
    assert numbers(options.steps, "--steps", STEPS) == (8,)
    whole = file.stem.startswith(WHOLE)
    assert kinds_of_prompts(options.prompts) == (("present", "all") if whole else ("present",))
    resize = "release" if file.stem.endswith("_release") else "paper" if options.data.list else "square"
    assert options.data.resize == resize
    assert options.unsupervised.threshold is None or thresholds(options.unsupervised.threshold, "") == THRESHOLDS
    assert options.out == f"runs/evaluate/{file.stem}"


def test_its_header_says_the_command_and_what_the_paper_reports_for_just_this(file):
    options, said = parse(["--config", str(file)]), header(file)
    assert said.count(f"python evaluate.py --config configs/eval/{file.stem}.yaml") == 2
    (protocol,) = protocols(options.protocol)
    assert (protocol == "unsupervised") == file.stem.startswith("unsupervised_")
    mine = lambda figure: (figure.method, figure.dataset, figure.protocol) == (METHOD, options.data.name, protocol)
    reported = {(figure.model, figure.magnet): figure.miou for figure in FIGURES if mine(figure)}
    if file.stem in OTHER_MEASURES or not reported:
        assert "the paper reports none" in said
        return
    assert (
        f"mIoU reported by the paper; not measured here: SD3 {reported['SD3', None]}, SD3.5 {reported['SD3.5', None]}; "
        f"SD3 with MAGNET's adapters trained on SA-1B {reported['SD3', 'SA-1B']}, on COCO {reported['SD3', 'COCO']}."
    ) in said
    assert ("Those " in said) == (options.data.resize not in RESIZES), "where they are of another way, it is named"


def test_its_times_are_arithmetic_and_say_so(file):
    said, seeds = header(file), 3
    needed = stages(CONFIGS["transformer"], CONFIGS["vae"], 1024, 9)["needed"]
    passes = seeds * (1 + PROMPTS.get(parse(["--config", str(file)]).data.name or "", 1) * file.stem.startswith(WHOLE))
    image = needed["autoencoder"] + passes * (sum(needed.values()) - needed["autoencoder"])
    (images,) = re.findall(r"the (\d+) (?:val|images of gtsegs)", said)
    found = re.search(
        r"not measured\. Arithmetic: ([\d.]+) TFLOP an image .*?, ([\d.]+) PFLOP in all, ([\d.]+) min", said
    )
    assert found is not None
    total = image * int(images)
    said_in_one_decimal = [round(each, 1) for each in (image / 1e12, total / 1e15, total / 6e15)]
    assert [float(each) for each in found.groups()] == said_in_one_decimal


def test_eight_sets_are_asked_for_the_whole_vocabulary_beside_what_others_report_for_it():
    whole = {parse(["--config", str(file)]).data.name: file for file in FILES if file.stem.startswith(WHOLE)}
    assert set(whole) == set(EIGHT)
    for name, file in whole.items():
        options, said = parse(["--config", str(file)]), header(file)
        assert (SETS[name or ""].background is not None) == ("background.threshold grid" in said)
        assert options.data.background == ("scored" if name == "coco-object" else None)
        for figure in FIGURES if options.data.background is None else ():
            if (figure.dataset, figure.prompts) == (name, "all"):
                assert f"{figure.method} {figure.miou}" in said


def test_sets_of_one_object_have_the_words_and_the_rule_of_the_code_that_reports_them():
    single = {name for name, one in SETS.items() if one.single}
    asked = {
        options.data.name: options for file in FILES if (options := parse(["--config", str(file)])).data.name in single
    }
    assert set(asked) == single
    for name, rule in (("imagenet-segmentation", "mean"), ("voc-single", None)):
        options = asked[name]
        assert (options.background.threshold, options.metrics) == (rule, "average_precision")
        words = listed_words(options.background.competitors, "")
        assert words[0] == "background"
        assert not misfits(options.data, options.background)
        assert not unasked(options, kinds_of_prompts(options.prompts), metrics(options.metrics))


def test_every_column_of_the_two_tables_has_a_configuration():
    asked = {parse(["--config", str(file)]).data.name for file in FILES if not file.stem.startswith("unsupervised")}
    not_asked = {parse(["--config", str(file)]).data.name for file in FILES if file.stem.startswith("unsupervised")}
    assert set(BY_NAMES) <= asked
    assert set(WITHOUT_NAMES) <= not_asked


def test_the_releases_way_is_a_configuration_of_its_own_where_options_make_it():
    for file in FILES:
        options = parse(["--config", str(file)])
        released = file.stem.endswith("_release")
        how = options.unsupervised
        if file.stem.startswith("unsupervised_"):
            ours, theirs = ("pixel", "image", False), ("token", "row", True)
            assert (how.minmax, how.match, how.absent_classes) == (theirs if released else ours)
        if file.stem in OTHER_MEASURES:
            continue
        if options.data.name == "coco-object" and not file.stem.startswith("unsupervised_"):
            assert options.data.background == ("asked" if released else "ignored")
    asked = [file for file in FILES if not file.stem.startswith("unsupervised_") and file.stem.endswith("_release")]
    assert {parse(["--config", str(file)]).data.name for file in asked} == set(BY_NAMES)


def test_the_miniatures_best_masks_are_those_that_the_benchmark_calls_chosen():
    options = parse(["--config", str(MINIATURE)])
    assert options.masks == CHOSEN
    assert (options.model, options.data.name, options.data.split) == ("miniature", "scenes", None)
    assert kinds_of_prompts(options.prompts) == ("present", "all")
    assert header(MINIATURE).count("python evaluate.py --config configs/eval/miniature_best.yaml") == 2
