"""The paper's figures: its tables as data and in the documents, and beside which rows of ours they stand."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from flax import nnx
from rich.console import Console

from seg4diff_jax.data.sets import SETS
from seg4diff_jax.evaluation.paper_figures import BY_NAMES, FIGURES, IMAGES, MAGNET, WITHOUT_NAMES, reported
from seg4diff_jax.evaluation.results import tell
from seg4diff_jax.evaluation.rows import Metrics, Row, ScoredImages
from seg4diff_jax.evaluation.wording import Words
from seg4diff_jax.models.lora import IMAGE_ATTENTION, LoRAConfig, add_lora, attached
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.segmentation.unsupervised_scores import UNSUPERVISED_PROTOCOLS, UnsupervisedProtocol
from seg4diff_jax.text import Wording
from tests.reference.evaluations import made_up_benchmark, made_up_evaluation, scored_images

ROOT = Path(__file__).parents[2]
OPEN_VOCABULARY = """
| model | arch | MAGNET | VOC20 | Object | PC59 | ADE | City |
| ProxyCLIP | CLIP-H/14 | - | 83.3 | 49.8 | 39.6 | 24.2 | 42.0 |
| CorrCLIP | CLIP-H/14 | - | 91.8 | 52.7 | 47.9 | 28.8 | 49.9 |
| DiffSegmenter | SD1.5 | - | 66.4 | 40.0 | 45.9 | 24.2 | 12.4 |
| iSeg | SD1.5 | - | 82.9 | 57.3 | 39.2 | 24.2 | 24.8 |
| Seg4Diff | SD3 | - | 89.2 | 62.0 | 49.0 | 34.2 | 26.5 |
| Seg4Diff | SD3.5 | - | 86.1 | 57.8 | 43.4 | 30.7 | 23.8 |
| Seg4Diff | FLUX.1-dev | - | 83.1 | 50.6 | 38.2 | 23.9 | 17.1 |
| Seg4Diff | SD3 | SA-1B | 89.1 | 62.0 | 49.1 | 34.7 | 25.4 |
| Seg4Diff | SD3 | COCO | 89.8 | 62.9 | 51.2 | 35.2 | 26.0 |
"""
UNSUPERVISED = """
| model | arch | MAGNET | VOC21 | PC59 | Object | Stuff27 | City | ADE |
| ReCO | CLIP-L/14 | - | 25.1 | 19.9 | 15.7 | 26.3 | 19.3 | 11.2 |
| MaskCLIP | CLIP-B/16 | - | 38.8 | 23.6 | 20.6 | 19.6 | 10.0 | 9.8 |
| MaskCut | DINO-B/8 | - | 53.8 | 43.4 | 30.1 | 41.7 | 18.7 | 35.7 |
| DiffSeg | SD1.5 | - | 49.8 | 48.8 | 23.2 | 44.2 | 16.8 | 37.7 |
| DiffCut | SSD-1B | - | 62.0 | 54.1 | 32.0 | 46.1 | 28.4 | 42.4 |
| Seg4Diff | SD3 | - | 54.9 | 52.6 | 38.5 | 49.7 | 24.2 | 44.9 |
| Seg4Diff | SD3.5 | - | 52.3 | 52.9 | 36.8 | 47.1 | 24.2 | 41.5 |
| Seg4Diff | SD3 | SA-1B | 55.1 | 52.8 | 39.0 | 50.8 | 24.2 | 45.0 |
| Seg4Diff | SD3 | COCO | 56.1 | 53.5 | 38.8 | 53.5 | 24.4 | 45.4 |
"""
CLIP_SCORE = """
| CLIPScore | Pick-a-Pic | COCO | SA-1B | mean |
| SD3 | 27.0252 | 26.0638 | 28.3422 | 27.1437 |
| + MAGNET on SA-1B | 27.0547 | 26.2318 | 28.4476 | 27.2447 |
| + MAGNET on COCO | 27.0409 | 26.2319 | 28.5553 | 27.2760 |
"""
T2I_COMPBENCH = """
| T2I-CompBench++ | colour | shape | texture | 2D | 3D | non-spatial | numeracy | complex |
| SD3 | .7864 | .5644 | .7200 | .2435 | .3318 | .3124 | .5566 | .3719 |
| + MAGNET on SA-1B | .7836 | .5679 | .7252 | .2330 | .3151 | .3113 | .5460 | .3709 |
| + MAGNET on COCO | .7919 | .5687 | .7260 | .2301 | .3234 | .3120 | .5584 | .3735 |
"""
NORMALISATION = """
| softmax | min-max | VOC20 | Object |
| no | no | 83.2 | 55.1 |
| no | yes | 85.2 | 53.5 |
| yes | no | 89.0 | 61.8 |
| yes | yes | 88.3 | 57.0 |
"""
SET_OF_COLUMN = {
    ("open_vocabulary", "VOC20"): "voc20",
    ("open_vocabulary", "Object"): "coco-object",
    ("open_vocabulary", "PC59"): "context59",
    ("open_vocabulary", "ADE"): "ade20k150",
    ("open_vocabulary", "City"): "cityscapes19",
    ("unsupervised", "VOC21"): "voc21",
    ("unsupervised", "PC59"): "context60",
    ("unsupervised", "Object"): "coco-object",
    ("unsupervised", "Stuff27"): "coco-stuff27",
    ("unsupervised", "City"): "cityscapes19",
    ("unsupervised", "ADE"): "ade20k150",
}
MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD3 = MMDiTConfig.from_json(MEDIUM)
SD35 = MMDiTConfig.from_json(MEDIUM | {"qk_norm": "rms_norm", "dual_attention_layers": list(range(13))})
IMAGES_OF_VOC = scored_images("voc20", resize="release", images=1449)
SCORES = Metrics(50.0, 60.0, 70.0, {}, {}, {})
ASKED = Row(IMAGES_OF_VOC, "open_vocabulary", "present", "own", SCORES, block=9, step=8, seed=0)
DIVIDED = replace(
    ASKED,
    images=replace(IMAGES_OF_VOC, dataset="voc21", background="scored"),
    protocol="unsupervised",
    prompts="empty",
    names=None,
    merging=UNSUPERVISED_PROTOCOLS["release"],
)
CITY = {"dataset": "cityscapes19", "images": 500, "background": None}
OBJECT = {"dataset": "coco-object", "images": 4952, "unlabelled_images": 48, "unlabelled": "background"}


def changed(row: Row, **changes: Any) -> Row:
    """With other values of the row's own fields, or of its images' or its merging's."""
    take = lambda kind: {each.name: changes.pop(each.name) for each in fields(kind) if each.name in changes}
    images, merging = take(ScoredImages), take(UnsupervisedProtocol)
    return replace(
        row, images=replace(row.images, **images), merging=row.merging and replace(row.merging, **merging), **changes
    )


# ---- the tables -----------------------------------------------------------------------------------------------------


def lines_of(table: str) -> list[list[str]]:
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]


def figures_of(table: str, protocol: str, source: str) -> set[tuple]:
    head, *lines = lines_of(table)
    return {
        (
            SET_OF_COLUMN[protocol, column],
            protocol,
            method,
            model,
            None if magnet == "-" else magnet,
            float(cell),
            source,
        )
        for method, model, magnet, *cells in lines
        for column, cell in zip(head[3:], cells, strict=True)
    }


def test_the_data_are_the_papers_two_tables_figure_by_figure():
    first = figures_of(OPEN_VOCABULARY, "open_vocabulary", "Table 1")
    second = figures_of(UNSUPERVISED, "unsupervised", "Table 2")
    assert {figure[:-1] for figure in FIGURES} == first | second, "but for what methods are asked for"
    assert len(FIGURES) == 9 * 5 + 9 * 6, "each once"


@pytest.mark.parametrize(
    ("document", "table"),
    [
        ("docs/reproduce.md", OPEN_VOCABULARY),
        ("docs/reproduce.md", UNSUPERVISED),
        ("docs/reproduce.md", NORMALISATION),
        ("docs/magnet.md", CLIP_SCORE),
        ("docs/magnet.md", T2I_COMPBENCH),
    ],
)
def test_a_document_shows_a_table_of_the_paper_whole(document, table):
    text = (ROOT / document).read_text("utf-8")
    shown = [lines_of(block) for block in re.findall(r"(?m)(?:^\|.*\n)+", text)]
    shown = [[line for line in lines if not set("".join(line)) <= {"-"}] for lines in shown]
    assert lines_of(table) in shown


@pytest.mark.parametrize("document", ["README.md", "docs/reproduce.md", "docs/magnet.md"])
def test_what_magnet_lowers_is_said_where_its_gains_are(document):
    text = " ".join((ROOT / document).read_text("utf-8").split())
    assert re.search(r"Cityscapes.{,60}26\.5.{,40}25\.4.{,40}26\.0", text)
    assert re.search(r"2D.{,40}3D.{,40}non-spatial", text)


def test_the_noise_of_the_protocol_is_said_once():
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    text = " ".join(" ".join(path.read_text("utf-8").split()) for path in documents)
    assert len(re.findall(r"about 0\.2 (?:points of )?mIoU", text)) == 1


# ---- beside which rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ASKED, [89.2]),
        (changed(ASKED, resize="paper"), [89.2]),
        (changed(ASKED, dataset="ade20k150", images=2000, split="validation", names="release"), [34.2]),
        (changed(ASKED, **OBJECT, background="asked"), [62.0]),
        (changed(ASKED, **CITY), [26.5]),
        (DIVIDED, [54.9]),
        (changed(DIVIDED, threshold=0.035, dataset="coco-object", images=5000), [38.5]),
        (changed(DIVIDED, dataset="context60", images=5104), [52.6]),
        (changed(DIVIDED, dataset="coco-stuff27", images=5000, background=None), [49.7]),
        (changed(DIVIDED, **CITY), [24.2]),
    ],
)
def test_a_reported_figure_stands_beside_what_was_measured_in_its_way(row, expected):
    assert [figure.miou for figure in reported(row, SD3, 1024)] == expected


@pytest.mark.parametrize(
    ("row", "change"),
    [
        *((ASKED, {name: value}) for name, value in [("resize", "square"), ("resize", "aspect"), ("split", "train")]),
        *((ASKED, {name: value}) for name, value in [("prompts", "all"), ("names", "readable"), ("dataset", "voc21")]),
        *((ASKED, {name: value}) for name, value in [("block", 8), ("head", 3), ("step", 7), ("skipped", 1)]),
        (ASKED, {"images": 1448}),
        (ASKED, {"list": "mine.txt"}),
        (ASKED, {"words": Words(wording=Wording("a photo of {}"))}),
        (changed(ASKED, **OBJECT, background="asked"), {"below": 0.01}),
        (changed(ASKED, **OBJECT, background="asked"), {"unlabelled": "ignored"}),
        (ASKED, OBJECT | {"background": "ignored"}),
        (ASKED, OBJECT | {"background": "scored"}),
        *((DIVIDED, {name: value}) for name, value in [("threshold", 0.01), ("resize", "square"), ("minmax", "pixel")]),
        *((DIVIDED, {name: value}) for name, value in [("match", "image"), ("absent_classes", False), ("block", 8)]),
        (DIVIDED, {"background": "ignored"}),
        (DIVIDED, {"dataset": "voc20", "background": None}),
        (DIVIDED, {"dataset": "coco-stuff27", "images": 2175, "list": "curated.txt", "background": None}),
    ],
)
def test_no_figure_stands_beside_what_was_resized_asked_or_scored_otherwise(row, change):
    assert reported(row, SD3, 1024)
    assert reported(changed(row, **change), SD3, 1024) == ()


def test_the_model_and_its_adapters_decide_which_figures_they_are():
    said = lambda *model: [(figure.title, figure.miou) for figure in reported(ASKED, *model)]
    assert said(SD3, 1024) == [("Seg4Diff, SD3", 89.2)]
    assert said(SD35, 1024) == [("Seg4Diff, SD3.5", 86.1)]
    magnet = [("Seg4Diff, SD3 + MAGNET on SA-1B", 89.1), ("Seg4Diff, SD3 + MAGNET on COCO", 89.8)]
    assert said(SD3, 1024, MAGNET) == magnet, "a file of adapters does not say what it was trained on"
    assert said(SD35, 1024, MAGNET) == [], "the paper trained none for SD3.5"
    for change in ({"rank": 4}, {"alpha": 32.0}, {"blocks": (9,)}, {"targets": ("image.attention.q",)}):
        assert said(SD3, 1024, replace(MAGNET, **change)) == [], "other adapters than MAGNET's"


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"qk_norm": "rms_norm", "dual_attention_layers": [0]}, 1024),
        ({"qk_norm": "rms_norm"}, 1024),
        ({"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}, 1024),
        ({"num_layers": 6}, 1024),
        ({}, 512),
    ],
)
def test_no_figure_is_reported_for_another_model(changes, size):
    assert reported(ASKED, MMDiTConfig.from_json(MEDIUM | changes), size) == ()


@pytest.mark.parametrize("architecture", ["CLIP-H/14", "SD1.5", "FLUX.1-dev"])
def test_other_models_figures_stand_beside_no_row(architecture):
    assert any(figure.model == architecture for figure in FIGURES)
    shown = {figure.model for row in (ASKED, DIVIDED) for model in (SD3, SD35) for figure in reported(row, model, 1024)}
    assert shown == {"SD3", "SD3.5"}


def test_sets_that_have_reported_figures_are_known():
    assert {*BY_NAMES, *WITHOUT_NAMES} == IMAGES.keys()
    assert IMAGES.keys() <= SETS.keys()


def test_adapters_are_told_from_the_model_that_has_them(sd3):
    model = sd3.transformer
    assert attached(model) is None
    assert attached(add_lora(model, LoRAConfig(), nnx.Rngs(0))) == MAGNET
    some = LoRAConfig(rank=2, alpha=3.0, targets=("text.attention.k", IMAGE_ATTENTION[0]), blocks=(1,))
    found = attached(add_lora(model, some, nnx.Rngs(0)))
    assert found == replace(some, targets=("image.attention.q", "text.attention.k"))


def test_the_terminal_names_reported_figures_under_what_was_measured(capsys):
    shown = tuple(figure for figure in FIGURES if (figure.dataset, figure.magnet) == ("context59", "COCO"))
    assert len(shown) == 1
    shown += tuple(figure for figure in FIGURES if figure.dataset == "voc20")[:1]
    change = lambda row: replace(row, reported=shown)
    evaluation = made_up_evaluation(made_up_benchmark(("cat", "sky")), change=change)
    tell(Console(), evaluation)
    lines = [line for line in capsys.readouterr().out.splitlines() if "as reported" in line]
    assert [line.split("as reported")[0].strip(" │,") for line in lines] == [one.title for one in shown]
    assert [str(one.miou) in line for one, line in zip(shown, lines, strict=True)] == [True, True]
