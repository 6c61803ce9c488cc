"""What one perturbed block does to pictures, as one page for a browser: scores by block, a table and the pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from seg4diff_jax.analysis.perturbation_scores import PerturbationScores
from seg4diff_jax.analysis.statistics_page import Plot
from seg4diff_jax.analysis.summary import Spread
from seg4diff_jax.reporting.inline_pictures import photograph
from seg4diff_jax.reporting.page_templates import page_environment
from seg4diff_jax.reporting.svg_plots import Series, line_plot

LONGEST = 160
"""Pixels along the longer side of a picture."""
MOST_ROWS = 12
"""Most prompts whose pictures are shown."""


class Row(NamedTuple):
    """Pictures of a prompt under one seed: the unperturbed one, then one for each block."""

    prompt: str
    pictures: Sequence[UInt8[np.ndarray, "height width 3"]]


def perturbation_page(
    rows: Iterable[Row],
    scores: PerturbationScores | None,
    *,
    blocks: Sequence[int],
    model: str,
    about: Sequence[str],
    models: Mapping[str, str],
    without: str,
    guided: bool,
    expert: int | None,
) -> str:
    """Returns the page.

    Args:
      rows: the first `MOST_ROWS` are shown, and taken one at a time.
      about: what was done, and to what: a line each.
      models: name of the model of each score.
      without: what is said if there are no scores.
      guided: the pictures are guided away from the perturbed prediction.
      expert: the checkpoint's own expert block, if it names one.
    """
    template = page_environment("analysis/templates").get_template("perturbation.html.jinja")
    titles = [plain := plain_title(guided), *(f"block {block}" for block in blocks)]
    shown = [
        (row.prompt, [photograph(title, Image.fromarray(pixels), LONGEST) for title, pixels in _titled(titles, row)])
        for row in islice(rows, MOST_ROWS)
    ]
    contents: dict[str, Any] = {"model": model, "about": about, "expert": expert, "guided": guided, "plain": plain}
    contents |= {"titles": titles, "blocks": [None, *blocks], "rows": shown, "scores": scores, "without": without}
    if scores is not None:
        contents |= {
            "names": [*models],
            "by": by_models(models),
            "plots": _plots(scores, plain),
            "table": table(scores),
        }
    return template.render(contents) + "\n"


def plain_title(guided: bool) -> str:
    """Returns the title of the pictures that the others are held against."""
    return "not guided away" if guided else "unperturbed"


def _titled(titles: Sequence[str], row: Row) -> zip[tuple[str, np.ndarray]]:
    return zip(titles, row.pictures, strict=True)


def table(scores: PerturbationScores) -> list[tuple[int | None, list[str]]]:
    """Returns rows of cells, one for each block, the unperturbed one (None) first: 100 x the mean, ± its error."""
    by_block = scores.by_block
    plain = [f"{100 * scores.plain_clip_t:.2f}" if name == "CLIP-T" else "" for name in by_block]
    cells = [[_cell(spread, at) for spread in by_block.values()] for at in range(len(scores.blocks))]
    return [(None, plain), *zip(scores.blocks, cells, strict=True)]


def by_models(models: Mapping[str, str]) -> str:
    """Returns which model each score is by, such as: CLIP-I and CLIP-T by openai/clip-vit-large-patch14."""
    each = {which: [name for name, other in models.items() if other == which] for which in models.values()}
    return ", ".join(f"{' and '.join(names)} by {which}" for which, names in each.items())


def _cell(spread: Spread, at: int) -> str:
    mean, error = (100 * float(values[at]) for values in spread)
    return f"{mean:.2f}" + (f" ± {error:.2f}" if error else "")


def _plots(scores: PerturbationScores, plain: str) -> list[Plot]:
    found = []
    for name, spread in scores.by_block.items():
        level = 100 * scores.plain_clip_t if name == "CLIP-T" else None
        points = [(100 * float(mean), 100 * float(error)) for mean, error in zip(*spread, strict=True)]
        least = min([mean - error for mean, error in points] + ([] if level is None else [level]))
        series = [Series(points, scores.blocks.index(scores.lowest[name]))]
        drawn = line_plot(
            f"{name} by block",
            scores.blocks,
            series,
            horizontal="block",
            vertical="100 x cosine",
            level=level,
            bottom=10 * int(np.floor(least / 10)),
        )
        legend = [] if level is None else [("level", plain)]
        found.append(Plot(f"{name} by block", drawn, legend=legend))
    return found
