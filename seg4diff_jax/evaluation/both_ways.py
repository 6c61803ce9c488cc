"""The two ways of asking side by side: for the classes present, which is an oracle, and for the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from seg4diff_jax.evaluation.paper_figures import published
from seg4diff_jax.evaluation.rows import BASELINES, Row, Setting, best_setting, by_setting, guesses, mean_figures

PRESENT, ALL = "present", "all"
COLUMNS = {PRESENT: "classes present", ALL: "whole vocabulary"}
"""The title of each way of asking, in the order of columns."""


class BothWays(NamedTuple):
    """A line of the table.

    Attributes:
      miou: mean over seeds and spread in percent, for each of `COLUMNS`; None where nothing was measured or published.
      source: where a published figure stands; empty for what was measured.
      guess: whether it is what guessing scores.
    """

    title: str
    miou: dict[str, tuple[float, float] | None]
    source: str = ""
    guess: bool = False


def both_ways(rows: Sequence[Row], baselines: Sequence[Row]) -> list[BothWays]:
    """Returns the lines: the best setting of each way of asking, what is published for the set, and guessers.

    Beside the best setting stand the paper's masks, where it is of refined ones.

    Returns no lines if rows are not of both ways of asking.
    """
    own = {kind: [row for row in rows if row.prompts == kind] for kind in COLUMNS}
    if not all(own.values()):
        return []
    settings = by_setting(rows)
    miou = lambda some: mean_figures(some, ["miou"])["miou"]
    found: dict[Setting, BothWays] = {}
    best = {kind: best_setting(some) for kind, some in own.items()}
    plain = [chosen._replace(refined=False) for chosen in best.values() if chosen.refined]
    for chosen in (*best.values(), *plain):
        alike = {kind: chosen._replace(prompts=kind) for kind in COLUMNS}
        found[alike[PRESENT]] = BothWays(chosen.title, {kind: miou(settings[at]) for kind, at in alike.items()})
    lines = list(found.values())
    for figure in published(own[PRESENT][0]):
        scores = {kind: (figure.miou, 0.0) if figure.prompts == kind else None for kind in COLUMNS}
        lines.append(BothWays(figure.title, scores, figure.source))
    guessed = {kind: guesses(baselines, at) for kind, at in best.items()}
    for name in guessed[PRESENT]:
        lines.append(BothWays(BASELINES[name], {kind: miou(guessed[kind][name]) for kind in COLUMNS}, guess=True))
    return lines
