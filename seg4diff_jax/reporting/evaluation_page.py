"""An evaluation as a page for a browser: scores beside what guessing would score, and pictures.

`index.html` and `pictures/NN_NAME_{scene,truth,predicted,heat_CC}.png`: NN in the page's order, CC the class's index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.scores import averaged, by_setting, groups, guesses
from seg4diff_jax.reporting.colors import class_colors
from seg4diff_jax.reporting.evaluation_style import STYLE
from seg4diff_jax.reporting.overlays import heat_picture
from seg4diff_jax.reporting.segmentation_files import file_name

if TYPE_CHECKING:
    from seg4diff_jax.evaluation.run import Evaluation, Shown

PAGE, PICTURES = "index.html", "pictures"
LONGEST = 256
"""Pixels along the longer side of a picture on the page."""
IGNORED_COLOR = (226, 226, 226)


def write_page(directory: Path, evaluation: Evaluation, benchmark: Benchmark, config: Mapping[str, Any]) -> None:
    """Write `index.html` and its pictures into a directory that exists.

    Args:
      config: what was run, plain values; `model` is told in the heading, all of it at the end.
    """
    first = evaluation.rows[0]
    asked = {"present": "the names of the classes in it", "all": "the whole vocabulary"}
    kinds = " or ".join(asked[kind] for kind in dict.fromkeys(row["prompts"] for row in evaluation.rows))
    heading = (
        f"{config['model']} on {benchmark.name}: {first['images']} images, each asked for {kinds}; "
        "one pass on each noised image, no training on masks, no refinement."
    )
    parts = [
        f"<h1>Zero-shot open-vocabulary segmentation</h1><p class=faint>{escape(heading)}</p>",
        _headline(evaluation),
        f"<h2>Blocks and noise levels</h2><div class=panel>{_settings_table(evaluation)}</div>",
        f"<h2>Classes</h2>{_classes(evaluation, benchmark)}",
        _images(directory, evaluation, benchmark),
        f"<h2>How it was made</h2><div class=panel>{_listing(config)}</div>",
    ]
    page = (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>Zero-shot segmentation: {escape(benchmark.name)}</title><style>{STYLE}</style>"
        f"<main>{''.join(parts)}</main></html>\n"
    )
    (directory / PAGE).write_text(page, encoding="utf-8")


# ---- numbers --------------------------------------------------------------------------------------------------------


def number(value: tuple[float, float] | None, digits: int = 1) -> str:
    """Mean and spread over seeds for reading; nothing where there was nothing to score."""
    if value is None:
        return "–"
    mean, spread = value
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else "")


def _headline(evaluation: Evaluation) -> str:
    block, step, prompts = evaluation.best
    rows = by_setting(evaluation.rows)[evaluation.best]
    seeds = f", {len(rows)} seeds" if len(rows) > 1 else ""
    mean = averaged(rows, ["miou", "pixel_accuracy"])
    baselines = guesses(evaluation.baselines, evaluation.best)
    compared = {f"block {block}, noise level {step}": rows}
    compared |= {_guess(name, some[0]): some for name, some in baselines.items()}
    if len({row["prompts"] for row in evaluation.rows}) > 1:
        seeds += f", asked for {prompts} classes"
    lines = []
    for place, (title, some) in enumerate(compared.items()):
        score = averaged(some, ["miou"])["miou"]
        lines.append(
            f"<tr{' class=best' * (not place)}><td>{escape(title)}<td class=wide>{_bar(score, mark=not place)}"
            f"<td class=number>{number(score)}"
        )
    return (
        f"<div class=top><div class=panel><div class=faint>mean IoU, %</div>"
        f"<div class=score>{number(mean['miou'] and (mean['miou'][0], 0.0))}</div>"
        f"<div class=faint>block {block} at noise level {step} of 28{seeds}<br>"
        f"pixel accuracy {number(mean['pixel_accuracy'])} %<br>"
        f"{rows[0]['images_per_second']:.0f} images/s a pass</div></div>"
        f"<div class=panel><table><tr><th>mean IoU on the same images<th><th class=number>%{''.join(lines)}"
        "</table></div></div>"
    )


def _guess(name: str, row: Mapping[str, Any]) -> str:
    return {
        "random": f"random: for each image token one of the classes {_of(row)} (chance)",
        "constant": f"one class everywhere: the {row.get('choice')} of those {_of(row)}",
        "permuted": f"block {row['block']}'s own scores, their positions permuted",
    }[name]


def _of(row: Mapping[str, Any]) -> str:
    return "present" if row["prompts"] == "present" else "in the vocabulary"


def _settings_table(evaluation: Evaluation) -> str:
    names = ["miou", "pixel_accuracy", "things", "stuffs"]
    shown = [name for name in names if any(row[name] is not None for row in evaluation.rows)]
    titles = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}
    several = len({row["prompts"] for row in evaluation.rows}) > 1
    head = "".join(f"<th class=number>{titles.get(name, name)}" for name in shown)
    lines = []
    for setting, rows in by_setting(evaluation.rows).items():
        mean = averaged(rows, shown)
        cells = "".join(f"<td class=number>{number(mean[name])}" for name in shown)
        best = setting == evaluation.best
        lines.append(
            f"<tr{' class=best' * best}><td class=number>{setting.block}<td class=number>{setting.step}"
            f"{f'<td>{setting.prompts}' * several}"
            f"<td class=wide>{_bar(mean['miou'], mark=best)}{cells}"
        )
    asked = "<th>asked for" * several
    return f"<table><tr><th class=number>block<th class=number>noise level{asked}<th>{head}{''.join(lines)}</table>"


def _classes(evaluation: Evaluation, benchmark: Benchmark) -> str:
    rows = by_setting(evaluation.rows)[evaluation.best]
    scores = averaged([row["iou"] for row in rows], benchmark.classes)
    grouped = {name: list(classes) for name, classes in groups(benchmark).items() if classes}
    grouped = grouped or {"": list(range(len(benchmark.classes)))}
    colors = class_colors(len(benchmark.classes))
    parts = []
    for title, classes in grouped.items():
        known = [index for index in classes if scores[benchmark.classes[index]] is not None]
        known.sort(key=lambda index: -(scores[benchmark.classes[index]] or (0, 0))[0])
        lines = "".join(
            f"<div class=class>{_swatch(colors[index])}<b>{escape(benchmark.classes[index])}</b>"
            f"{_bar(scores[benchmark.classes[index]], mark=True)}"
            f"<span class=number>{number(scores[benchmark.classes[index]])}</span></div>"
            for index in known
        )
        parts.append(f"<p class=faint>{escape(title)}</p><div class=classes>{lines}</div>")
    title = f"<p class=faint>IoU of each class, %, block {evaluation.best.block}</p>"
    return f"<div class=panel>{title}{''.join(parts)}</div>"


def _bar(value: tuple[float, float] | None, *, mark: bool = False) -> str:
    width = 0.0 if value is None else value[0]
    return f'<div class="bar{" mark" * mark}" style="width:{width:.1f}%"></div>'


def _listing(config: Mapping[str, Any]) -> str:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
    lines = "".join(f"<tr><td class=faint>{escape(name)}<td>{escape(str(value))}" for name, value in flat.items())
    return f"<table>{lines}</table>"


# ---- pictures -------------------------------------------------------------------------------------------------------


def _images(directory: Path, evaluation: Evaluation, benchmark: Benchmark) -> str:
    if not evaluation.shown:
        return ""
    folder = directory / PICTURES
    folder.mkdir(exist_ok=True)
    for former in folder.glob("[0-9][0-9]*_*.png"):
        former.unlink()
    colors = class_colors(len(benchmark.classes))
    cards = "".join(
        _card(folder, f"{place:02d}_{file_name(shown.example.name)}", shown, benchmark.classes, colors)
        for place, shown in enumerate(evaluation.shown)
    )
    count, images = len(evaluation.shown), evaluation.rows[0]["images"]
    remark = (
        f"{count} of {images}, evenly spaced from the image with the most pixels right to the one with the fewest. "
        "Heat: where image tokens attend to a class's words, each map from its own least to its greatest."
    )
    return f"<h2>Images, from best to worst</h2><p class=faint>{remark}</p>{cards}"


def _card(folder: Path, stem: str, shown: Shown, classes: Sequence[str], colors: UInt8[np.ndarray, "classes 3"]) -> str:
    labels = shown.example.labels
    pictures = {
        "scene": displayed(Image.fromarray(shown.image), Image.Resampling.LANCZOS),
        "truth": displayed(painted(labels, colors), Image.Resampling.NEAREST),
        "predicted": displayed(painted(shown.predicted, colors), Image.Resampling.NEAREST),
    }
    figures = [_figure(folder, f"{stem}_{name}.png", picture, name, large=True) for name, picture in pictures.items()]
    heat = [
        _figure(folder, f"{stem}_heat_{index:02d}.png", heat_picture(shown.image, scores, LONGEST), classes[index])
        for index, scores in zip(shown.classes, shown.scores, strict=True)
    ]
    names = "".join(f"<span>{_swatch(colors[index])} {escape(classes[index])}</span>" for index in shown.classes)
    ignored = f"<span>{_swatch(IGNORED_COLOR)} not labelled</span>" if (labels >= len(classes)).any() else ""
    strip = f"<div class=strip>{''.join(figures)}<div class=heat>{''.join(heat)}</div></div>"
    return (
        f"<div class='panel image'><header><span>{escape(shown.example.name)}</span>"
        f"<span class=faint>{shown.accuracy:.1f} % of pixels right</span></header>"
        f"{strip}<div class=legend>{names}{ignored}</div></div>"
    )


def _figure(folder: Path, file: str, picture: Image.Image, title: str, *, large: bool = False) -> str:
    picture.save(folder / file, compress_level=4)
    shape = f"width={picture.width} height={picture.height}"
    return (
        f'<figure{" class=large" * large}><img src="{PICTURES}/{escape(file)}" {shape} alt="{escape(title)}" '
        f'style="height:auto"><figcaption>{escape(title)}</figcaption></figure>'
    )


def painted(labels: Integer[np.ndarray, "height width"], colors: UInt8[np.ndarray, "classes 3"]) -> Image.Image:
    """Labels in their classes' colours; those that name no class in grey."""
    table = np.concatenate([colors, np.array([IGNORED_COLOR], np.uint8)])
    return Image.fromarray(table[np.minimum(labels.astype(np.int64), len(colors))])


def displayed(picture: Image.Image, resampling: Image.Resampling) -> Image.Image:
    """At the page's size; small pictures are magnified by a whole number, so that their pixels stay square."""
    longest = max(picture.size)
    if longest > LONGEST:
        scale = LONGEST / longest
        return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), resampling)
    times = LONGEST // longest
    return picture.resize((picture.width * times, picture.height * times), resampling)


def _swatch(color: UInt8[np.ndarray, 3] | tuple[int, int, int]) -> str:
    return '<i class=swatch style="background:#{:02x}{:02x}{:02x}"></i>'.format(*color)
