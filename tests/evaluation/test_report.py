"""The page of an evaluation, opened in a browser where there is one: what it shows, and that it asks for nothing."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from seg4diff_jax.data.coco_categories import CATEGORIES
from seg4diff_jax.evaluation.gallery import pictured
from seg4diff_jax.evaluation.paper_figures import Figure
from seg4diff_jax.evaluation.report.confusions import confused
from seg4diff_jax.evaluation.report.images import HEAT_LONGEST, LONGEST, card, segments_card
from seg4diff_jax.evaluation.report.page import PAGE, write_page
from seg4diff_jax.evaluation.rows import by_setting
from seg4diff_jax.reporting.colors import PAGE_COLORS, class_colors, ink_on, neutral_colors, oklab, palette, tint
from seg4diff_jax.reporting.svg_plots import LINE_COLORS
from seg4diff_jax.segmentation.presence import SCORES
from seg4diff_jax.segmentation.unsupervised_scores import UNSUPERVISED_PROTOCOLS
from tests.reference.browser import BROWSER, browser, visit
from tests.reference.evaluations import (
    CONFIG,
    MADE,
    made_up_benchmark,
    made_up_evaluation,
    made_up_further,
    made_up_images,
    made_up_segments,
)

MARKUP = '<script>console.error("let in")</script> & "sofa"'
"""The name of a class."""
REPORTED = tuple(
    Figure("context59", "open_vocabulary", "Seg4Diff", "SD3", magnet, miou, "Table 1")
    for magnet, miou in (("SA-1B", 49.1), ("COCO", 51.2))
)
RELEASED = UNSUPERVISED_PROTOCOLS["release"]
A4_BETWEEN_MARGINS = 703
"""CSS pixels."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("there is no chromium or chrome to open the page in")
    with browser() as opened:
        yield opened


@pytest.fixture
def tab(chromium) -> Iterator[Page]:
    with chromium.new_page() as page:
        yield page


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Few classes, many settings, two ways of asking, two seeds."""
    benchmark = made_up_benchmark(("cat", MARKUP, "dining table", "sky", "grass", "wall-brick"), things=3)
    further = made_up_further(benchmark)
    evaluation = made_up_evaluation(
        benchmark,
        blocks=range(24),
        steps=range(2, 29, 2),
        seeds=(0, 1),
        prompts=("present", "all"),
        shown=made_up_images(benchmark, 6, (64, 48), present=4),
        change=lambda row: replace(row, further=further) if row.prompts == "all" else row,
    )
    evaluation.skipped.append("images/<b>1</b>.png: cannot be read")
    return written(tmp_path_factory.mktemp("sweep"), evaluation, benchmark)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """COCO's 171 classes and photographs, one setting."""
    names = [one.name for one in CATEGORIES]
    benchmark = made_up_benchmark(names, things=sum(one.thing for one in CATEGORIES))
    evaluation = made_up_evaluation(
        benchmark,
        shown=made_up_images(benchmark, 12, (240, 320), present=20),
        change=lambda row: replace(row, reported=REPORTED),
    )
    return written(tmp_path_factory.mktemp("large"), evaluation, benchmark)


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> Path:
    """Both protocols, the second as the release matches; images of each."""
    benchmark = made_up_benchmark([f"class {index}" for index in range(30)])
    evaluation = made_up_evaluation(
        benchmark,
        prompts=("present", None),
        shown=made_up_images(benchmark, 6, (48, 64), present=20),
        divided=made_up_segments(benchmark, 6, (150, 100), present=20),
        change=lambda row: replace(row, merging=row.merging and RELEASED),
    )
    return written(tmp_path_factory.mktemp("divided"), evaluation, benchmark)


def written(directory: Path, evaluation, benchmark) -> Path:
    write_page(directory, evaluation, benchmark, CONFIG, MADE)
    assert [path.name for path in directory.iterdir()] == [PAGE]
    return directory / PAGE


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("page", ["sweep", "large", "divided"])
def test_it_opens_without_a_complaint_or_a_request_and_fits_the_window(tab, page, width, request):
    file = request.getfixturevalue(page)
    seen = visit(tab, file, width)
    assert seen.told == []
    assert seen.requested == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    pictures = tab.evaluate("[...document.images].map(one => [one.complete && one.naturalWidth > 0, one.alt])")
    assert len(pictures) >= 18
    assert all(loaded and title for loaded, title in pictures)


@pytest.mark.parametrize("page", ["sweep", "large", "divided"])
def test_nothing_is_cut_off_in_print(tab, page, request):
    visit(tab, request.getfixturevalue(page), A4_BETWEEN_MARGINS)
    tab.emulate_media(media="print")
    beyond = "[...document.querySelectorAll('.panel, .tile, .card *')].filter(one => one.getBoundingClientRect()"
    assert tab.evaluate(f"{beyond}.right > innerWidth + 1).map(one => one.outerHTML.slice(0, 200))") == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= A4_BETWEEN_MARGINS
    pdf = tab.pdf(format="A4", prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 1


def test_bars_are_as_long_as_the_scores_beside_them(tab, large):
    visit(tab, large)
    bars = tab.evaluate(
        "[...document.querySelectorAll('.classes li')].map(one => [one.querySelector('.bar').offsetWidth /"
        "one.querySelector('.track').offsetWidth, one.querySelector('.number').textContent])"
    )
    assert len(bars) == 171
    assert np.array([length for length, _ in bars]) == pytest.approx(
        [float(score) / 100 for _, score in bars], abs=0.03
    )


def test_names_that_look_like_markup_are_shown_as_they_are(tab, sweep):
    visit(tab, sweep)
    text = tab.evaluate("document.body.textContent")
    assert MARKUP in text
    assert "images/<b>1</b>.png" in text
    assert tab.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize(
    ("intruder", "noticed"),
    [
        ("<script>console.error('oh')</script>", "oh"),
        ("<script>console.log('hello')</script>", "hello"),
        ("<script>undefined.member</script>", "Uncaught TypeError"),
        ("<img src='http://example.org/a.png'>", "http://example.org/a.png"),
        ("<img src='absent.png'>", "absent.png"),
        ("<link rel=stylesheet href='https://example.org/a.css'>", "https://example.org/a.css"),
        ("<style>body { background: url(//example.org/b.png) }</style>", "example.org/b.png"),
    ],
)
def test_complaints_and_requests_do_not_go_unnoticed(tab, tmp_path, sweep, intruder, noticed):
    (tmp_path / "bare.html").write_text(f"<!doctype html><title>bare</title><body>{intruder}")
    seen = visit(tab, tmp_path / "bare.html")
    assert any(noticed in each for each in (*seen.told, *seen.requested))
    if "src" in intruder or "href" in intruder:
        assert any(noticed in each for each in seen.requested)
    # In the page itself its own policy forbids it: the browser refuses, and says so.
    (tmp_path / "changed.html").write_text(sweep.read_text().replace("</main>", f"{intruder}</main>"))
    seen = visit(tab, tmp_path / "changed.html")
    assert any("Content Security Policy" in each for each in seen.told)


# ---- what it says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["sweep", "large", "divided"])
def test_it_holds_everything_that_it_names(page, request):
    text = request.getfixturevalue(page).read_text()
    addresses = re.findall(r"""\b(?:src|href|srcset|data|action)\s*=\s*["']?([^"'\s>]*)""", text)
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert not re.search(r"https?://|@import|url\(|<script|<iframe|<object", text)


def test_twelve_photographs_and_171_classes_are_less_than_5_megabytes(large):
    assert large.stat().st_size < 5e6


def test_reported_figures_stand_beside_what_was_measured(large):
    text = " ".join(re.sub(r"<[^>]*>", " ", large.read_text()).split())
    assert "mIoU reported" in text
    for one in REPORTED:
        assert f"mIoU that the paper reports {one.miou} {one.title}, Table 1" in text
        assert re.search(rf"{one.miou} {re.escape(one.title)}; [+-]\d+\.\d here", text)


def test_there_are_plots_by_block_and_noise_level_and_of_both_where_both_are_swept(sweep, large):
    assert large.read_text().count('class="plot"') == 0
    text = sweep.read_text()
    assert text.count('class="plot"') == 4, (
        "two lines each by block and by noise level; a heat map for each way of asking"
    )
    assert text.count('<g class="cell">') == 2 * 24 * 14
    assert text.count('<g class="line">') == 4


def test_segments_without_names_have_a_page_too(tmp_path):
    benchmark = made_up_benchmark(("cat", "sky"))
    change = lambda row: replace(row, segments=4.2, metrics=replace(row.metrics, pixel_accuracy=None))
    evaluation = made_up_evaluation(benchmark, blocks=(3, 9), prompts=(None,), change=change)
    assert evaluation.confusion is None
    text = written(tmp_path, evaluation, benchmark).read_text()
    for part in (
        "Zero-shot unsupervised segmentation",
        "each image one segment",
        "positions permuted",
        "threshold 0.1",
    ):
        assert part in text
    for part in ("taken for", "<h2>Images", "pixel accuracy"):
        assert part not in text


def test_images_of_both_protocols_are_shown_one_after_the_other_as_they_were_matched(divided):
    text = divided.read_text()
    assert re.findall("<h2>(Images .*)</h2>", text) == [
        "Images asked for the classes present",
        "Images divided into segments without names",
    ]
    named, without = text.split("<h2>Images")[1:]
    for part in (named, without):
        assert re.findall("<h3>(.*)</h3>", part) == ["The best", "At random", "The worst"]
        assert part.count("<article") == 6
    assert "Heat" in named
    assert "match" not in named
    assert "Heat" not in without
    for said in ("a match of each row of pixels by itself", "Classes that are not there are matched too", "as drawn"):
        assert said in without


def test_presence_has_a_table_for_each_way_of_asking_that_names_what_is_not_there(sweep):
    section = sweep.read_text().split("<h2>Is it there?</h2>")[1].split("</section>")[0]
    assert section.count("<h3>") == 1
    assert "Asked for the whole vocabulary" in section
    assert " below present classes alone" in section
    for score in SCORES:
        assert f'<th scope="row">{score}</th>' in section
    assert re.findall('<th scope="row">(\\d+ to \\d+)</th>', section) == [f"{n} to {n + 10}" for n in range(0, 100, 10)]


def test_figures_beside_miou_have_columns_of_their_own(sweep, large):
    for title, value in (("boundary IoU", "31.5"), ("pointing game", "72.5")):
        assert f'<th scope="col" class="number">{title}</th>' in sweep.read_text()
        assert f'<td class="number">{value}</td>' in sweep.read_text()
        assert title not in large.read_text()


def test_nothing_to_score_is_no_error(tmp_path):
    benchmark = made_up_benchmark(("cat", "sky"))
    nothing = {"miou": None, "pixel_accuracy": None, "iou": {"cat": None, "sky": None}}
    change = lambda row: replace(row, metrics=replace(row.metrics, **nothing))
    evaluation = replace(made_up_evaluation(benchmark, blocks=(3, 9), change=change), baselines=[])
    assert by_setting(evaluation.rows)[evaluation.best]
    assert "Not in these images: cat, sky." in written(tmp_path, evaluation, benchmark).read_text()


# ---- its parts ------------------------------------------------------------------------------------------------------


def test_confusions_are_shares_of_what_is_there_and_of_what_is_said():
    matrix = np.array([[50, 30, 20, 0], [10, 90, 0, 0], [0, 5, 5, 0], [0, 0, 0, 0]])
    first, third = confused(matrix, [0, 2], others=1, sources=2)
    assert (first.of_all, first.found, first.right) == pytest.approx((100 * 100 / 210, 50, 100 * 50 / 60))
    assert first.taken_for == [(1, pytest.approx(30))]
    assert first.elsewhere == pytest.approx(20)
    assert first.made_of == [(1, pytest.approx(100 * 10 / 60))]
    assert third.taken_for == [(1, pytest.approx(50))]
    assert third.made_of == [(0, pytest.approx(80))]
    never_said = confused(np.array([[0, 4], [0, 4]]), [0])[0]
    assert (never_said.found, never_said.right, never_said.made_of) == (0, None, [])


def test_shown_images_are_a_third_each_of_the_best_the_worst_and_of_those_between():
    accuracy = np.random.default_rng(3).permutation(30).astype(float)
    several = np.ones((30, 2), np.int64)
    found = pictured(accuracy, several, 9)
    assert found == pictured(accuracy, several, 9)
    assert [accuracy[image] for image, why in found if why == "best"] == [29, 28, 27]
    assert [accuracy[image] for image, why in found if why == "worst"] == [2, 1, 0]
    between = [accuracy[image] for image, why in found if why == "random"]
    assert len(between) == 3
    assert between == sorted(between, reverse=True)
    assert all(2 < each < 27 for each in between)
    assert [why for _, why in pictured(accuracy, several, 2)] == ["best", "worst"]
    everything = pictured(accuracy, several, 100)
    assert sorted(image for image, _ in everything) == list(range(30))


def test_images_of_one_class_are_not_the_best_while_there_are_others():
    accuracy = np.array([100.0, 100, 100, 80, 60])
    histograms = np.array([[9, 0, 0], [5, 4, 0], [2, 3, 4], [8, 1, 0], [3, 6, 0]])
    assert [image for image, why in pictured(accuracy, histograms, 5) if why == "best"] == [2, 1]


def test_a_card_has_small_pictures_and_the_iou_of_each_class_in_the_image():
    benchmark = made_up_benchmark([f"class {index}" for index in range(30)])
    (shown,) = made_up_images(benchmark, 1, (420, 560), present=20)
    made = card(shown, benchmark.classes)
    assert [(one.width, one.height) for one in made.pictures] == [(LONGEST, LONGEST * 3 // 4)] * 3
    assert all(max(one.width, one.height) <= HEAT_LONGEST for one in made.heat)
    assert len(made.heat) < 20
    assert made.unnamed == 20 - (len(made.legend) - 1)
    counts = shown.example.labels != 255
    for entry in made.legend[:-1]:
        index = benchmark.classes.index(entry.name)
        true, said = (shown.example.labels == index), (shown.predicted == index) & counts
        assert entry.iou == pytest.approx(100 * (true & said).sum() / (true | said).sum())
    assert made.legend[-1].name == "not labelled"
    beside = card(replace(shown, papers=shown.example.labels.astype(np.int32)), benchmark.classes)
    assert [one.title for one in beside.pictures] == ["image", "truth", "the paper's masks", "refined masks"]
    assert [one.title for one in made.pictures] == ["image", "truth", "prediction"]


@pytest.mark.parametrize("by_rows", [False, True])
def test_matched_segments_have_the_colour_of_their_class_and_others_greys_of_their_own(by_rows):
    benchmark = made_up_benchmark([f"class {index}" for index in range(30)])
    (shown,) = made_up_segments(benchmark, 1, (210, 280), present=8)
    made = segments_card(shown, benchmark.classes, by_rows=by_rows)
    assert [one.title for one in made.pictures] == ["image", "truth", "segments"]
    picture = Image.open(BytesIO(b64decode(made.pictures[2].source.split(",")[1]))).convert("RGB")
    drawn = np.asarray(picture)
    assert drawn.shape == (210, 280, 3)
    of_segment = [np.unique(drawn[shown.segments == segment], axis=0) for segment in range(len(shown.owners))]
    assert all(len(colors) == 1 for colors in of_segment)
    colors = np.concatenate(of_segment)
    np.testing.assert_array_equal(colors[::2], class_colors(30)[shown.owners[::2]])
    greys = colors[1::2].astype(int)
    assert np.ptp(greys, axis=1).max() < 40
    np.testing.assert_array_less(0.035, distances(colors), "apart from each other, and from the colours of classes")

    names = {benchmark.classes[owner] for owner in shown.owners[::2]}
    assert {entry.name for entry in made.legend[:-2]} == names
    assert made.legend[-2].name == "not labelled"
    assert made.legend[-1].name == "8 segments without a class"
    assert set(made.legend[-1].colors) == {"#{:02x}{:02x}{:02x}".format(*grey) for grey in greys}
    share = (shown.owners[shown.segments] < 0).mean()
    assert made.legend[-1].remark == f"{100 * share:.1f} % of the image"
    counts = shown.example.labels != 255
    as_drawn = 100 * (shown.owners[shown.segments] == shown.example.labels)[counts].mean()
    assert made.as_drawn == (pytest.approx(as_drawn) if by_rows else None)


def test_a_class_that_a_segment_has_and_the_image_has_not_is_named_so():
    benchmark = made_up_benchmark(("cat", "dog", "sky"))
    (shown,) = made_up_segments(benchmark, 1, (40, 60), present=2)
    absent = ({0, 1, 2} - {*shown.owners.tolist()}).pop()
    given = replace(shown, owners=np.array([*shown.owners[:3], absent]))
    made = segments_card(given, benchmark.classes, by_rows=False)
    (entry,) = [one for one in made.legend if one.name == benchmark.classes[absent]]
    assert (entry.iou, entry.remark) == (None, "not in the truth")
    assert made.legend[-1].name == "a segment without a class"


def test_greys_are_apart_from_each_other_and_from_what_they_are_beside():
    beside = palette()[15:40]  # some of them are nearly grey
    for count in (0, 1, 12, 76):
        greys = neutral_colors(count, beside)
        assert greys.shape == (count, 3)
        least = 0.02 if count > 12 else 0.035
        assert count == 0 or distances(np.concatenate([greys, beside]))[:count].min() > least


def distances(colors: np.ndarray) -> np.ndarray:
    """Of each colour to the nearest other; from 0.02 on people tell them apart side by side."""
    lab = oklab(colors)
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1)
    return np.where(np.eye(len(lab)) > 0, np.inf, apart).min(axis=1)


def test_plots_and_the_page_have_the_same_colours(sweep):
    text = sweep.read_text()
    assert all(f"--{name}: {color};" in text for name, color in PAGE_COLORS.items())
    assert all(f"stroke: {color}" in text for color in LINE_COLORS[:2])


def test_letters_on_colours_have_the_contrast_that_wcag_asks_for():
    def luminance(color) -> float:
        encoded = np.array(color) / 255
        linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    for color in (*palette(), *(tint(share) for share in np.linspace(0, 1, 50))):
        pale, dark = sorted((luminance(color), luminance(ink_on(color))), reverse=True)
        assert (pale + 0.05) / (dark + 0.05) >= 4.5


def test_a_screenshot_of_the_page_is_not_blank(tab, large, tmp_path):
    visit(tab, large)
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    seen = Image.open(tmp_path / "page.png").convert("RGB")
    assert seen.width == 1280
    assert seen.height > 3000
    assert len(seen.resize((128, seen.height // 10)).getcolors(1 << 20) or ()) > 1000
