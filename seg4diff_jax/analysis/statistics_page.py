"""Every block's statistics as one page for a browser: plots, a table and the pictures, with nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from seg4diff_jax.analysis.summary import Spread, Summary
from seg4diff_jax.reporting.inline_pictures import photograph
from seg4diff_jax.reporting.page_templates import page_environment
from seg4diff_jax.reporting.svg_plots import Series, heat_plot, line_plot

LONGEST = 256
"""Pixels along the longer side of a picture."""
MOST_PICTURES = 24
LINES = {"image to text": "on all text", "image to words": "on the prompt's words"}


@dataclass(frozen=True)
class Plot:
    """A plot of the page. `kind`: "wide" takes a whole row; `legend`: the class and the text of each line's entry."""

    caption: str
    drawing: Markup
    kind: str = ""
    legend: Sequence[tuple[str, str]] = ()


def statistics_page(
    levels: Mapping[str, Summary],
    *,
    model: str,
    about: str,
    expert: int | None,
    pictures: Sequence[tuple[str, np.ndarray]] = (),
) -> str:
    """Returns the page.

    Args:
      levels: the summary under the title of each noise level.
      about: what was looked at, the rest of a sentence.
      expert: the checkpoint's own expert block, if it names one.
      pictures: titles and pixels; `MOST_PICTURES` are shown.
    """
    shown = [photograph(title, Image.fromarray(pixels), LONGEST) for title, pixels in pictures[:MOST_PICTURES]]
    template = page_environment("analysis/templates").get_template("statistics.html.jinja")
    contents = [_level(title, summary) for title, summary in levels.items()]
    return template.render(model=model, about=about, expert=expert, levels=contents, pictures=shown) + "\n"


def _level(title: str, summary: Summary) -> dict[str, Any]:
    shares = {name: spread for name, spread in summary.quantities.items() if " to " in name}
    others = {name: spread for name, spread in summary.quantities.items() if name not in shares}
    if summary.mean_ious is not None:
        others["mIoU by labels, %"] = Spread(summary.mean_ious, np.zeros_like(summary.mean_ious))
    return {
        "title": title,
        "candidates": summary.candidates,
        "uniform": summary.uniform,
        "samples": summary.samples,
        "plots": _plots(summary),
        "tables": [_table("Shares of attention, %", shares, 100), _table("Values, queries and keys", others, 1)],
    }


def _table(title: str, quantities: Mapping[str, Spread], scale: float) -> dict[str, Any]:
    cells = [_cells(spread, scale) for spread in quantities.values()]
    return {"title": title, "columns": list(quantities), "rows": list(enumerate(zip(*cells, strict=True)))}


def _cells(spread: Spread, scale: float) -> list[str]:
    largest = float(np.nanmax(np.abs(scale * spread.mean), initial=0))
    digits = 1 if largest >= 2 else 2
    write = lambda mean, deviation: f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")
    return [
        write(scale * mean, scale * deviation) if np.isfinite(mean) else "-"
        for mean, deviation in zip(*spread, strict=True)
    ]


def _plots(summary: Summary) -> list[Plot]:
    blocks = range(len(summary.text_shares))
    heads = range(summary.text_shares.shape[1])
    lines = {name: summary.quantities[name] for name in LINES if np.isfinite(summary.quantities[name].mean).any()}
    series = [
        Series([(100 * m, 100 * d) if np.isfinite(m) else None for m, d in zip(*one, strict=True)])
        for one in lines.values()
    ]
    legend = [(f"series{number}", LINES[name]) for number, name in enumerate(lines)]
    legend.append(("level", "on text without any preference"))
    caption = "Attention of image tokens, by block"
    drawn = line_plot(caption, blocks, series, horizontal="block", vertical="%", level=100 * summary.uniform)
    plots = [Plot(caption, drawn, legend=legend)]
    for caption, values in (
        ("Attention of image tokens on text by head, %", 100 * summary.text_shares),
        ("Norm of text's values as a multiple of the image's, by head", summary.norm_ratios),
    ):
        drawn = heat_plot(caption, values.T, heads, blocks, vertical="head", horizontal="block")
        plots.append(Plot(caption, drawn, "wide" if len(blocks) > 12 else ""))
    return plots
